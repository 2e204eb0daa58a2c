"""The task: problems, prompts, grading, rewards and toy problems, without torch."""
