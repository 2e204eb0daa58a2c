"""`python -m grpo_gsm8k.bench`."""

import sys

from grpo_gsm8k.bench import main
from grpo_gsm8k.errors import ConfigError

try:
    main()
except ConfigError as fault:
    sys.exit(f"error: {fault}")
