"""`grpo-gsm8k launch up` as a script: python scripts/runpod_launch.py --budget 5 --image … -- grpo-gsm8k demo"""

import sys

from grpo_gsm8k.cli import main

main(["launch", "up", *sys.argv[1:]])
