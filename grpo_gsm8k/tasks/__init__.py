"""What is asked and what is right: graders, data generators and the calculator. No torch in here."""
