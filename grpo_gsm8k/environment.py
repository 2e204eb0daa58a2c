"""What a command takes from the environment: a `.env` file, and variables under the names that other tools gave them.

`.env` lies in the folder where the command is typed, as `.env.example` shows. A variable that is set already wins, also
over one of the file, and a variable without a value (`WANDB_API_KEY=`) counts as not set.
"""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values

from grpo_gsm8k.errors import ConfigError

FILE = Path(".env")
ALSO_CALLED = {
    "HUGGINGFACE_HUB_TOKEN": "HF_TOKEN",
    "PROGRESS_WEBHOOK_URL": "GRPO_GSM8K_WEBHOOK",
    "TINKER_TOKEN": "TINKER_API_KEY",
}
"""Name elsewhere → name here."""


def load(path: Path = FILE) -> None:
    """Set what `path` says and the environment does not, then what stands under another name. Prints no value.

    Raises:
        ConfigError: the file cannot be read as text.
    """
    if path.is_file():
        try:
            found = dotenv_values(path, encoding="utf-8")
        except OSError as fault:
            raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
        except ValueError:
            raise ConfigError(f"{path}: is not UTF-8 text with a line NAME=value for each variable") from None
        for name, value in found.items():
            if value and "\0" not in value and name not in os.environ:
                os.environ[name] = value
    for other, name in ALSO_CALLED.items():
        if os.environ.get(other) and name not in os.environ:
            os.environ[name] = os.environ[other]
