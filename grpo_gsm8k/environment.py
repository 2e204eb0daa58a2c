"""What a command takes from the environment: a `.env` file, and variables under the names that other tools gave them.

`.env` lies in the folder where the command is typed, as `.env.example` shows. A variable that is set already wins, also
over one of the file, and a variable without a value (`WANDB_API_KEY=`) counts as not set.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from grpo_gsm8k.errors import ConfigError

FILE = Path(".env")
ALSO_CALLED = {
    "HUGGINGFACE_HUB_TOKEN": "HF_TOKEN",
    "PROGRESS_WEBHOOK_URL": "GRPO_GSM8K_WEBHOOK",
    "TINKER_TOKEN": "TINKER_API_KEY",
}
"""Name elsewhere → name here."""


logging.getLogger("dotenv.main").setLevel(logging.ERROR)  # it warns of a wrong line without the file's name


def load(path: Path = FILE) -> list[str]:
    """Set what `path` says and the environment does not, then what stands under another name. Prints no value.

    Returns:
        A sentence for each line that sets nothing because it is no NAME=value. Such a line may be another tool's.

    Raises:
        ConfigError: the file cannot be read as text.
    """
    wrong: list[str] = []
    if path.is_file():
        try:
            found = dotenv_values(path, encoding="utf-8")
            with path.open(encoding="utf-8") as lines:
                bad = [part.original.line for part in parse_stream(lines) if part.error]
        except OSError as fault:
            raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
        except ValueError:
            raise ConfigError(f"{path}: is not UTF-8 text with a line NAME=value for each variable") from None
        wrong = [f"{path}:{line}: is no NAME=value, and sets nothing" for line in bad]
        for name, value in found.items():
            if value and "\0" not in value and name not in os.environ:
                os.environ[name] = value
    for other, name in ALSO_CALLED.items():
        if os.environ.get(other) and name not in os.environ:
            os.environ[name] = os.environ[other]
    return wrong
