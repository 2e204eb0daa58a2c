"""`grpo-gsm8k tokenize` under its first name: --infile F --model_id M --out_dir D, and all of its other flags."""

from grpo_gsm8k.cli import run_command

if __name__ == "__main__":
    run_command("tokenize")
