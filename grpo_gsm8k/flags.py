"""From the fields of a config to the flags of a command: a panel a topic, one spelling, the nearest name for a mistake.

`--help` shows what most people set. `--help_all` adds the fields that `config.py` marks as `expert`. Help, messages and
completion spell a flag `--model_id`, as the docs do; `--model-id` is the same flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from grpo_gsm8k import originals

F = TypeVar("F", bound=Callable[..., Any])

METAVARS = {
    "int": "INTEGER",
    "float": "FLOAT",
    "str": "TEXT",
    "Path": "PATH",
    "list[str]": "TEXT",
    "list[Path]": "PATH",
}
NARROW = 60  # columns of a terminal below which each text stands under its flag
SHORT = 12  # letters of a list of choices that fits where a metavar stands
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "GPUs to use",
    "HF_TOKEN": "the hub's key, for gated and private models",
    "HF_HOME": "where models and datasets are kept",
    "HF_ENDPOINT": "another hub",
    "HF_HUB_OFFLINE": "1: ask no hub",
    "WANDB_API_KEY": "switches W&B on",
    "WANDB_MODE": "offline: W&B writes to disk",
    "TINKER_API_KEY": "the training service's key",
    "TINKER_BASE_URL": "its address",
    "VLLM_API_KEY": "what clients of the served model send",
    "MODAL_KEY": "Modal's proxy token",
    "MODAL_SECRET": "its other half",
    "RUNPOD_API_KEY": "the provider's key",
    "RUNPOD_API_BASE_URL": "its API's address",
    "GRPO_GSM8K_WEBHOOK": "URL for progress events",
    "GRPO_GSM8K_WEBHOOK_SECRET": "signs them",
    "DISCORD_WEBHOOK_URL": "the same as messages",
    "SSH_PUBLIC_KEY": "may log in to the pod, too",
    "SSH_PRIVATE_KEY_PATH": "so may the public half of this one",
}
"""Variables that commands read besides those that a field names; their help lists them."""
HUB = ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE")
SERVICE = ("TINKER_API_KEY", "TINKER_BASE_URL")
RUN = ("CUDA_VISIBLE_DEVICES", *HUB, "WANDB_API_KEY", "WANDB_MODE", *SERVICE)
SERVED = ("VLLM_API_KEY", "MODAL_KEY", "MODAL_SECRET")
RENT = (
    *("RUNPOD_API_KEY", "RUNPOD_API_BASE_URL", "HF_TOKEN", "SSH_PUBLIC_KEY", "SSH_PRIVATE_KEY_PATH"),
    *("GRPO_GSM8K_WEBHOOK", "GRPO_GSM8K_WEBHOOK_SECRET", "DISCORD_WEBHOOK_URL"),
)


def flags_of(cls: type, skip: typing.Container[str] = ()) -> list[inspect.Parameter]:
    """One optional keyword parameter per config field, the command's own fields first."""
    owners = {field.name: _owner(cls, field.name) for field in dataclasses.fields(cls)}
    fields = sorted(dataclasses.fields(cls), key=lambda field: owners[field.name] is not cls)
    hints = typing.get_type_hints(cls)
    return [_flag(field, hints[field.name], panel(owners[field.name])) for field in fields if field.name not in skip]


def panel(cls: type) -> str:
    """The title over the fields of a config class: its docstring as far as the first stop."""
    return re.split(r"[.;:]", cls.__doc__ or "")[0]


def _owner(cls: type, name: str) -> type:
    """The class that declares a field first; a stage that gives it another default does not own it."""
    return next(base for base in reversed(cls.__mro__) if name in vars(base).get("__annotations__", {}))


def _flag(field: dataclasses.Field[Any], hint: Any, panel: str) -> inspect.Parameter:
    told = field.metadata
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    kind: Any = str if choices else list[str] if told["many"] else hint  # config.py checks choices, and joins lists
    shown = "|".join(choices)
    option = typer.Option(
        f"--{field.name}/--no_{field.name}" if hint is bool else f"--{field.name}",
        *([told["also"]] if told["also"] else []),
        help=_help(field, "" if len(shown) <= SHORT else f" ({', '.join(choices)})"),
        metavar=None
        if hint is bool
        else shown
        if 0 < len(shown) <= SHORT
        else told["metavar"] or _metavar(kind, shown),
        hidden=told["expert"],
        rich_help_panel=panel,
        callback=_given if told["many"] else None,
        autocompletion=(lambda incomplete: [c for c in choices if c.startswith(incomplete)]) if choices else None,
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _given(values: list[str] | None) -> Any:
    """None for a flag that was not given, of which click makes an empty tuple."""
    return list(values) if values else None


def _metavar(kind: type, choices: str) -> str:
    return "CHOICE" if choices else METAVARS[kind.__name__]


def _help(field: dataclasses.Field[Any], choices: str) -> str:
    """A field's help with its choices, its variable and its default, as rich markup."""
    env = f" [env: {field.metadata['env']}]" if field.metadata["env"] else ""
    default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return _escaped(field.metadata["help"] + choices + env + (f" [default: {default}]" if default else ""))


def _escaped(text: str) -> str:
    """What rich would take for a tag is marked as text."""
    return re.sub(r"(\[[a-z#/@][^\[\]]*\])", r"\\\1", text)


def spelled(flag: str) -> str:
    """A flag as it is shown: dashes only in front."""
    return re.sub(r"(?<=[^-])-", "_", flag)


def help_all(expert: Iterable[str]) -> inspect.Parameter:
    """The flag that shows every flag of a command, those of these names included."""
    names = set(expert)

    def show(context: typer.Context, value: bool) -> None:
        if value and not context.resilient_parsing:
            shown = [parameter for parameter in context.command.params if parameter.name in names]
            with _set_for_now(shown, "hidden", False):
                typer.echo(context.get_help())
            raise typer.Exit

    text = f"also show the {len(names)} flags for experts, and exit"
    option = typer.Option("--help_all", help=text, is_eager=True, callback=show)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("help_all", kind, default=False, annotation=Annotated[bool, option])


@contextlib.contextmanager
def _set_for_now(parameters: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """Set an attribute of each parameter while its help is drawn; the next command line finds the old one."""
    before = [(parameter, getattr(parameter, name)) for parameter in parameters]
    try:
        for parameter, _ in before:
            setattr(parameter, name, value)
        yield
    finally:
        for parameter, old in before:
            setattr(parameter, name, old)


def epilog(variables: Iterable[str], switches: bool = True) -> str:
    """What stands below a command's flags."""
    said = ["A switch such as --name is undone by --no_name; - and _ in a flag are the same."] if switches else []
    named = "; ".join(f"{name} ({ENVIRONMENT[name]})" for name in variables)
    return "\n\n".join([*said, *([f"Environment: {named}."] if named else [])])


class Command(TyperCommand):
    """A command whose help does without the `--no_` form of each switch: it would take half of the line."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, without a type."""
        return _untyped(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as typer does where the terminal has room for its columns."""
        switches = [parameter for parameter in self.params if isinstance(parameter, TyperOption)]
        width = shutil.get_terminal_size().columns
        with _set_for_now(switches, "secondary_opts", []):
            if width >= NARROW:
                super().format_help(ctx, formatter)
            else:
                formatter.write("\n".join(self._narrow(ctx, width)))

    def _narrow(self, ctx: Any, width: int) -> Iterator[str]:
        """The help, each text under its flag."""
        for paragraph in (self.get_usage(ctx), self.help or ""):
            yield from [*textwrap.wrap(paragraph, width), ""]
        panels: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
        for title, parameters in panels.items():
            yield from textwrap.wrap(f"{title}:", width)
            for parameter in parameters:
                names = ", ".join(parameter.opts) if isinstance(parameter, TyperOption) else parameter.metavar
                kind = parameter.metavar if isinstance(parameter, TyperOption) else ""
                yield f"  {names} {kind}".rstrip()
                text = getattr(parameter, "help", "").replace("\\[", "[")
                yield from textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
            yield ""
        for paragraph in (self.epilog or "").split("\n\n"):
            yield from textwrap.wrap(paragraph, width)


class App(typer.Typer):
    """typer's application, whose commands are all of the class above."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """As typer's, with another default for `cls`."""
        return super().command(name, **{"cls": Command, **settings})

    @functools.cached_property
    def tree(self) -> Any:
        """The commands as click has them, built once: a process may run many command lines."""
        group = typer.main.get_command(self)
        for parameter in group.params:  # typer has added those of completion behind ours
            _show_in_our_words(parameter)
        return group


class Commands(TyperGroup):
    """A group of commands that spells flags in one way and knows its commands by either spelling."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in (self, *self.commands.values()):
            for parameter in command.params:
                _show_in_our_words(parameter)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """`prep-eval` and `prep_eval` are the same."""
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, cmd_name.replace("_", "-"))

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, without a type."""
        return _untyped(super().get_help_option(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named first; an error names the nearest one."""
        if not self.get_command(ctx, args[0]) and not args[0].startswith("-") and not ctx.resilient_parsing:
            here = originals.COMMANDS.get(args[0].replace("_", "-"))
            known = f" (here: {here})" if here in self.commands else nearest(args[0], self.commands)
            ctx.fail(f"no such command: {args[0]}{known}")
        return super().resolve_command(ctx, args)


def _show_in_our_words(parameter: Any) -> None:
    """One spelling, INTEGER for `<int>`, and no range beside it: help and message say what is allowed."""
    parameter.opts = [spelled(flag) for flag in parameter.opts]
    parameter.secondary_opts = [spelled(flag) for flag in parameter.secondary_opts]
    kind = METAVARS.get(parameter.bare_type(), "")
    vars(parameter)["_get_number_range_help_str"] = lambda: None
    if isinstance(parameter, TyperArgument):
        parameter.metavar = parameter.metavar or str(parameter.name).upper()
        vars(parameter)["display_type_rich"] = lambda ctx: kind
    elif parameter.metavar is None:
        parameter.metavar = "" if parameter.is_flag else kind


def _untyped(option: Any) -> Any:
    if option:
        option.metavar = ""
    return option


def mistake(fault: Any) -> str:
    """What a wrong command line gets to hear: of an unknown flag, the nearest one."""
    unknown, near = getattr(fault, "option_name", None), getattr(fault, "possibilities", None)
    if not unknown or type(fault).__name__ != "NoSuchOption":
        return str(fault.format_message().rstrip("."))
    return f"no such flag: {spelled(unknown)}{nearest(spelled(unknown), map(spelled, near or ()))}"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean --group_size?)`, or nothing where no name is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
