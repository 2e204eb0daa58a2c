"""argparse for commands that must run without typer, with the one-line errors of the other commands."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Names the nearest flag to one that is not there, and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does; exits with 2 and one line on stderr where it cannot."""
        found, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            name = word.partition("=")[0].replace("-", "_")
            near = difflib.get_close_matches(name, {flag.replace("-", "_") for flag in self._flags()}, n=1)
            hint = f" (did you mean --{near[0].lstrip('_')}?)" if near else ""
            self.error(f"no such flag: {word}{hint}" if word.startswith("-") else f"what is {word!r} for?")
        return found

    def error(self, message: str) -> Any:
        """Exit with 2 and one line."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")

    def _flags(self) -> Iterator[str]:
        """All flags, those of the commands below included."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    yield from below._flags()
