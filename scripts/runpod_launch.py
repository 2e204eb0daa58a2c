"""`grpo-gsm8k launch up` as a script.

python scripts/runpod_launch.py --model_id Qwen/Qwen2.5-0.5B --gpu-count 1 --budget 5     # train it by GRPO
python scripts/runpod_launch.py --budget 5 -- grpo-gsm8k demo                             # a job of one's own
"""

import sys

from grpo_gsm8k.cli import main

main(["launch", "up", *sys.argv[1:]])
