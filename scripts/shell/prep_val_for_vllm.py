"""`grpo-gsm8k prep-eval` under its first name: --infile F --model_id M --outfile F, and all of its other flags."""

from grpo_gsm8k.cli import run_command

if __name__ == "__main__":
    run_command("prep-eval")
