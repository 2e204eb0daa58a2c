"""Code of a user's own: loaded by `module:name`, and blamed for what it raises.

`--task`, `--reward`, `--advantage` and `--loss` take such names. The module is looked for where the command was typed,
too.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import ConfigError, GrpoError


def load(spec: str, what: str) -> Any:
    """The object that `package.module:name` names.

    Args:
        what: the option that `spec` was given to, for the error.

    Raises:
        ConfigError: there is no such module or no such name in it, or importing it fails.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{what} {spec!r}: must be the name of one, or package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:  # the user's module lies where the command was typed
        sys.path.insert(0, here)
    try:
        with users_code(f"{what} {spec!r}: importing {module_name}"):
            module = importlib.import_module(module_name)
    except ConfigError as fault:
        missing = fault.__cause__.name if isinstance(fault.__cause__, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise ConfigError(f"{what} {spec!r}: no module {module_name!r} (looked in {here} too)") from None
        raise
    if not hasattr(module, name):
        raise ConfigError(f"{what} {spec!r}: {module_name} has no {name!r}")
    return getattr(module, name)


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Inside, whatever is raised is a mistake in a user's code: one line that names its file and line.

    With an empty `what` the code is our own, and its bugs keep their tracebacks.
    """
    try:
        yield
    except GrpoError:
        raise
    except Exception as fault:
        if not what:
            raise
        frame = traceback.extract_tb(fault.__traceback__)[-1]
        said = " ".join(str(fault).split())[:300]
        where = f"{frame.filename}:{frame.lineno}"
        raise ConfigError(f"{what} raised {type(fault).__name__}: {said or 'no message'} ({where})") from fault


def is_users(spec: str) -> bool:
    """Whether a name is of a user's own code."""
    return ":" in spec
