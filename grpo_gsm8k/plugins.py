"""Loads and calls a user's own code, named `package.module:name`, and turns its exceptions into one line.

Rewards, losses, advantages, tasks and samplers are named this way on the command line.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_gsm8k.errors import ConfigError, GrpoError, PluginError


def load_object(spec: str, kind: str, known: Iterable[str] = ()) -> Any:
    """The object that `spec`, `package.module:name`, names. The current directory is searched, too.

    Args:
        kind: for the error message: "reward", "loss", …
        known: the package's own names of this kind.

    Raises:
        ConfigError: the module or the name does not exist, or the import raises.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        names = sorted(known)
        near = difflib.get_close_matches(spec, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{kind} {spec!r}: must be {', '.join([*names, 'or package.module:name'])}{hint}")
    here = str(Path.cwd())
    if here not in sys.path:  # users keep the module in the directory where they type the command
        sys.path.insert(0, here)
    if not all(part.isidentifier() for part in module_name.split(".")) or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise ConfigError(f"{kind} {spec!r}: {module_name!r} is not a module name; write {dotted}:{name}")
    try:
        with calling(f"{kind} {spec!r}", ModuleNotFoundError):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as fault:
        if fault.name is not None and f"{module_name}.".startswith(f"{fault.name}."):
            raise ConfigError(f"{kind} {spec!r}: no module {module_name!r} (looked in {here} too)") from None
        raise ConfigError(f"{kind} {spec!r}: {_where(fault)}{fault}") from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            place = getattr(module, "__file__", None) or "a namespace without a file"
            raise ConfigError(f"{kind} {spec!r}: {module_name} has no {name!r} ({place}){hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{kind} {spec!r}: {name} is a {type(found).__name__}, and cannot be called")
    return found


def is_users(spec: str) -> bool:
    """Whether a name points to a user's own code."""
    return ":" in spec


@contextmanager
def calling(what: str, *passed: type[Exception]) -> Iterator[None]:
    """Wraps a call of a user's own code: any exception becomes a `PluginError` with its file and line.

    Args:
        what: names the code, for the error message.
        passed: exceptions to let through, besides the package's own.
    """
    try:
        yield
    except (Exception, SystemExit) as fault:  # a user's code can raise anything
        if isinstance(fault, (GrpoError, *passed)):
            raise
        text = " ".join(str(fault).split())[:300]
        raise PluginError(f"{what}: {_where(fault)}{type(fault).__name__}{': ' * bool(text)}{text}") from fault


def _where(fault: BaseException) -> str:
    """`mine.py:12: `, the innermost line of the user's own code in the traceback; empty if there is none."""
    if isinstance(fault, SyntaxError) and fault.filename:
        return f"{fault.filename}:{fault.lineno}: "
    ours = (str(Path(__file__).parent), "<frozen")
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__) if not frame.filename.startswith(ours)]
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(sys.base_prefix)]
    at = (own or frames)[-1:]
    return "".join(f"{frame.filename}:{frame.lineno}: " for frame in at)
