"""`python -m grpo_gsm8k.bench`."""

from grpo_gsm8k.bench import main

main()
