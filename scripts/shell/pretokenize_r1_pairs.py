"""`grpo-gsm8k tokenize` under its first name, with its first defaults; all of its other flags are understood, too.

python scripts/shell/pretokenize_r1_pairs.py --model_id M --infile artifacts/r1_sft_pairs.jsonl
"""

import sys

from grpo_gsm8k.cli import main

DEFAULTS = {
    "infile": "artifacts/r1_sft_pairs.jsonl",
    "out_dir": "artifacts/tokenized",
    "max_total_tokens": "2048",
    "format": "pt",
}

if __name__ == "__main__":
    main(["tokenize", *(f"--{name}={value}" for name, value in DEFAULTS.items()), *sys.argv[1:]])
