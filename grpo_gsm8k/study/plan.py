"""The plan of a study, read from TOML: which arms, which seeds, how many problems, and what is assumed of the noise.

    question = "Does GRPO learn from its reward?"
    arms = ["grpo", "random", "base", "ei"]     # built in, or of a table [arm.NAME]
    seeds = [0, 1, 2]                           # or "auto": as many as the power asks for
    preset = "tiny"

Every mistake in it is found before anything is made. A plan is known by the sha256 of its file, so
`sha256sum plan.toml` shows what a page names.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from grpo_gsm8k import config
from grpo_gsm8k.config import opt
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.evals import crossed
from grpo_gsm8k.evals.crossed import Noise
from grpo_gsm8k.evals.stats import LEVEL

STAGES = ("sft", "ei", "grpo")
MADE = ("toy", "tiny_model")  # what is made where no data and no model are named
AUTO = "auto"
SET_HERE = ("seed", "out_dir", "resume", "max_steps", "data", "model_id", "task", "eval_path", "limit")
"""Settings that the study sets itself, or that stand at the top of the plan."""


@dataclass(frozen=True)
class PlanConfig:
    """The plan's own keys; `arms`, `seeds` and `problems` stand beside them."""

    question: str = opt("", "what the study asks, for its page")
    reference: str = opt("", "the arm that every other arm is compared with; empty: the first")
    preset: str = opt("", "recipe of every stage: tiny, quick or full")
    config: str = opt("", "recipe file laid over the preset")
    task: str = opt("", "what is asked; empty for the preset's")
    data: str = opt("", "folder with the three splits; empty for the preset's, or made up")
    model_id: str = opt("", "the base model; empty for the preset's, or made")
    seed: int = opt(0, "of the data and the model that are made up, and of a start that all seeds share", ge=0)
    stopping: Literal["fixed", "always_valid"] = opt(
        "fixed",
        "fixed: one look, when all runs are done; always_valid: a look after every seed, and an end when every "
        "comparison is decided",
    )


@dataclass(frozen=True)
class PowerConfig:
    """The effect that the study must find, and what it assumes of the noise."""

    effect: float = opt(0.05, "smallest difference in accuracy that matters", gt=0, lt=1)
    power: float = opt(0.8, "chance to find it", gt=0, lt=1)
    accuracy: float = opt(0.5, "of the reference", gt=0, lt=1)
    seed_sd: float = opt(0.02, "deviation of an arm's accuracy between seeds", ge=0, lt=1)
    disagree: float = opt(0.3, "share of problems on which runs of two arms differ", gt=0, lt=1)
    lasting: float = opt(0.3, "part of that difference's variance that is the same with every seed", ge=0, le=1)


@dataclass(frozen=True)
class CostConfig:
    """What a run costs, for `--dry_run` and for arms at equal dollars."""

    tokens_per_s: float = opt(0.0, "tokens of training a second; 0: as measured, else a rough guess", ge=0)
    dollars_per_hour: float = opt(0.0, "price of the machine that one run takes", ge=0)
    gpu: str = opt("", "the GPU that a guess is for, such as H100; empty: this machine")


@dataclass(frozen=True)
class StartConfig:
    """What arms start from: a stage that is run on the base model first."""

    stage: Literal["sft", "ei", "grpo"] = opt("sft", "which stage")
    per_seed: bool = opt(False, "run it once for every seed; else all seeds share it")


@dataclass(frozen=True)
class ArmConfig:
    """One arm; every other key of its table is a setting of its stage."""

    stage: Literal["", "sft", "ei", "grpo"] = opt("", "which stage; empty: that of `like`, else grpo")
    like: str = opt("", "another arm, whose settings this one takes first")
    start: Literal["start", "base"] = opt("start", "from the model of [start], or from the base model")
    equal: Literal["", "tokens", "seconds", "dollars"] = opt(
        "", "expert iteration: as many rounds as use up what the reference used with the same seed"
    )
    label: str = opt("", "its name on the page")
    dollars_per_hour: float = opt(0.0, "price of its machine, if it differs", ge=0)


@dataclass(frozen=True)
class Arm:
    """An arm with everything that `like` brings in.

    Attributes:
        settings: of its stage, over the preset and [common].
    """

    name: str
    stage: str
    start: str
    equal: str
    label: str
    dollars_per_hour: float
    settings: Mapping[str, Any]


BUILT_IN: dict[str, dict[str, Any]] = {
    "grpo": {"label": "GRPO", "stage": "grpo"},
    "random": {"label": "GRPO with a random reward", "reward": "random"},
    "base": {"label": "GRPO from the base model", "start": "base"},
    "ei": {"label": "expert iteration", "stage": "ei", "equal": "tokens"},
}
"""Arms that need no table. `random` and `base` take the settings of the plan's first GRPO arm."""
CONTROLS = ("random", "base")


@dataclass(frozen=True)
class Plan:
    """A plan without mistakes.

    Attributes:
        seeds: in the order in which they are run.
        problems: of the test split, the first so many; 0 for all.
        planned: which of `seeds` and `problems` the power set.
        start: None where every arm starts from the base model.
        tables: the tables [common], [eval], [toy] and [tiny_model].
    """

    path: Path
    text: bytes
    top: PlanConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    problems: int
    planned: tuple[str, ...]
    power: PowerConfig
    cost: CostConfig
    start: StartConfig | None
    start_settings: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def reference(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arm(self.top.reference or self.arms[0].name)

    @property
    def others(self) -> list[Arm]:
        """Every other arm: as many comparisons."""
        return [arm for arm in self.arms if arm.name != self.reference.name]

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def noise(self) -> Noise:
        """What is assumed of the results."""
        return Noise(self.power.seed_sd, self.power.disagree, self.power.lasting, self.power.accuracy)

    @property
    def looks(self) -> int:
        """At how many moments a verdict may fall: one, or after each seed from the second on."""
        return len(self.seeds) - 1 if self.top.stopping == "always_valid" else 1

    @property
    def strictest(self) -> float:
        """The level of the first of Holm's steps at one look, on which the power is planned."""
        return LEVEL / (len(self.others) * self.looks)

    def settings(self, section: str, flags: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's config as values: preset, recipe, [common], the section's own table, then `flags`."""
        known = vars(config.SECTIONS[section]())
        common = {key: value for key, value in self.tables.get("common", {}).items() if key in known}
        own = self.tables.get(section, {}) if section not in STAGES else {}
        task = {"task": self.top.task} if self.top.task and "task" in known else {}
        layers = {"preset": self.top.preset or None, "task": self.top.task}
        file = Path(self.top.config) if self.top.config else None
        return dict(vars(config.resolve(section, **layers, config_file=file, flags={**task, **common, **own, **flags})))


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        ConfigError: names the file, and what is wrong in it.
    """
    text, tables = _parsed(path)
    values = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    known = ("power", "cost", "start", "arm", "common", "eval", *MADE)
    for name in (key for key, value in tables.items() if isinstance(value, dict)):
        config.check_known(name, known, f"{path}: unknown table")
    top = config.of_table(PlanConfig, values, f"{path}:", ("arms", "seeds", "problems"))
    start = tables.get("start")
    plan = Plan(
        path,
        text,
        top,
        arms=_arms(path, values.get("arms"), tables.get("arm", {})),
        seeds=(),
        problems=0,
        planned=(),
        power=config.of_table(PowerConfig, tables.get("power", {}), f"{path}: [power]"),
        cost=config.of_table(CostConfig, tables.get("cost", {}), f"{path}: [cost]"),
        start=None if start is None else config.of_table(StartConfig, start, f"{path}: [start]", _keys_but(start)),
        start_settings={} if start is None else {key: start[key] for key in _keys_but(start)},
        tables={name: tables[name] for name in ("common", "eval", *MADE) if name in tables},
    )
    _check(plan)
    return _sized(plan, values)


def flat_tables(text: bytes) -> dict[str, Any]:
    """A TOML file as one level of keys, such as `arm.ei.rounds`: what two plans differ in."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", tomllib.loads(text.decode("utf-8-sig")))
    return flat


def _parsed(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        if path.is_char_device():
            raise ConfigError(f"{path}: is a device, not a plan")
        text = path.read_bytes()
        return text, tomllib.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such plan; docs/studies.md shows one") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"{path}: not a TOML file: {fault}") from None


def _keys_but(table: Mapping[str, Any], cls: type = StartConfig) -> list[str]:
    """The keys of a table that are settings of its stage."""
    own = vars(cls())
    return [key for key in table if key not in own]


# ------------------------------------------------------------------------------------------------ arms


def _arms(path: Path, names: Any, tables: Mapping[str, Any]) -> tuple[Arm, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{path}: arms is missing: a list of names, as in arms = ["grpo", "random", "base", "ei"]')
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{path}: arms: {twice!r} stands twice")
    if len(names) < 2:
        raise ConfigError(f"{path}: arms: at least two, or there is nothing to compare")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [arm] {name}: an arm stands in a table such as [arm.{name}]")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name) or name == "start":
            raise ConfigError(f"{path}: [arm.{name}]: a name is letters, digits, _ . -, and not start")
    known = {*BUILT_IN, *tables}
    for name in (*names, *(table["like"] for table in tables.values() if isinstance(table.get("like"), str))):
        config.check_known(name or "grpo", known, f"{path}: unknown arm")
    if unused := sorted(set(tables) - {*names, *(table.get("like") for table in tables.values())}):
        raise ConfigError(f"{path}: [arm.{unused[0]}] is in no list: add {unused[0]!r} to arms")
    found = {name: _merged(path, name, tables, ()) for name in names}
    first = next((name for name in names if name not in CONTROLS and _stage(found[name]) == "grpo"), "grpo")
    for name in CONTROLS:  # once the arm that they control is known
        if name in found:
            model = found.get(first) or _merged(path, "grpo", tables, ())
            found[name] = {**model, **BUILT_IN[name], **tables.get(name, {})}
    return tuple(_arm(path, name, found[name]) for name in names)


def _merged(path: Path, name: str, tables: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    """An arm's table over what it is like, over what is built in."""
    if name in seen:
        raise ConfigError(f"{path}: [arm.{name}] is like itself: {' → '.join((*seen, name))}")
    table = {**BUILT_IN.get(name, {}), **tables.get(name, {})}
    like = table.get("like")
    if not isinstance(like, str) or not like:
        return table
    below = {key: value for key, value in _merged(path, like, tables, (*seen, name)).items() if key != "label"}
    return {**below, **table}


def _stage(table: Mapping[str, Any]) -> Any:
    return table.get("stage") or "grpo"


def _arm(path: Path, name: str, table: Mapping[str, Any]) -> Arm:
    where = f"{path}: [arm.{name}]"
    keys = _keys_but(table, ArmConfig)
    own = config.of_table(ArmConfig, table, where, keys)
    stage = own.stage or "grpo"
    settings = {key: table[key] for key in keys}
    _check_settings(stage, settings, where, tuple(vars(own)))
    if own.equal and stage != "ei":
        raise ConfigError(f"{where} equal = {own.equal!r}: only expert iteration goes on until a budget is used up")
    label = own.label or name
    return Arm(name, stage, own.start, own.equal, label, own.dollars_per_hour, settings)


def _check_settings(stage: str, settings: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a setting that the stage does not have, or that is not an arm's to set."""
    for key in settings:
        if key in SET_HERE:
            raise ConfigError(f"{where} {key}: is the study's to set, the same for every arm")
        config.check_known(key, [*vars(config.SECTIONS[stage]()), *also], f"{where} unknown key")
    config.of_table(config.SECTIONS[stage], settings, where)


# ------------------------------------------------------------------------------------------------ the whole


def _check(plan: Plan) -> None:
    """Raise `ConfigError` for names and settings that do not go together."""
    path, top = plan.path, plan.top
    config.check_known(top.reference or plan.arms[0].name, [arm.name for arm in plan.arms], f"{path}: unknown arm")
    if plan.start:
        _check_settings(plan.start.stage, plan.start_settings, f"{path}: [start]", tuple(vars(plan.start)))
    known = {key for cls in config.SECTIONS.values() for key in vars(cls())}
    for key, value in plan.tables.get("common", {}).items():
        if key in SET_HERE:
            raise ConfigError(f"{path}: [common] {key}: stands at the top of the plan, or is the study's to set")
        config.check_known(key, known, f"{path}: [common] unknown key")
        for cls in config.SECTIONS.values():
            if key in vars(cls()):
                config.of_table(cls, {key: value}, f"{path}: [common]")
    for section in ("eval", *MADE):
        _check_section(plan, section, plan.tables.get(section, {}))
    for arm in plan.arms:
        _check_arm(plan, arm)
    if plan.start:
        _resolved(plan, plan.start.stage, plan.start_settings, f"{path}: [start]")
    most = 2 * plan.power.accuracy * (1 - plan.power.accuracy)
    if plan.power.disagree > most + 1e-9:
        raise ConfigError(
            f"{path}: [power] disagree = {plan.power.disagree}: two runs of accuracy {plan.power.accuracy} differ on "
            f"{most:.3g} of the problems at most"
        )
    if plan.power.accuracy + plan.power.effect >= 1 and plan.power.accuracy - plan.power.effect <= 0:
        raise ConfigError(f"{path}: [power] effect = {plan.power.effect}: accuracy leaves no room for it")


def _check_section(plan: Plan, section: str, values: Mapping[str, Any]) -> None:
    for key in values:
        if key in SET_HERE:
            raise ConfigError(f"{plan.path}: [{section}] {key}: is the study's to set")
    config.of_table(config.SECTIONS[section], values, f"{plan.path}: [{section}]")
    asked = _resolved(plan, section, {}, f"{plan.path}: [{section}]")
    if section == "eval" and asked["samples"] > 1 and asked["temperature"] == 0:
        raise ConfigError(f"{plan.path}: [eval] samples = {asked['samples']}: several need a temperature above 0")


def _resolved(plan: Plan, stage: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A stage's config as values. Raises `ConfigError` as the stage itself would, before anything is made."""
    from grpo_gsm8k import grpo

    try:
        values = plan.settings(stage, settings)
        if stage == "grpo":
            grpo.check(config.build(config.GrpoConfig, values))
    except ConfigError as fault:
        raise ConfigError(f"{where} {fault}") from None
    return values


def _check_arm(plan: Plan, arm: Arm) -> None:
    where = f"{plan.path}: [arm.{arm.name}]"
    settings = _resolved(plan, arm.stage, arm.settings, where)
    if not arm.equal:
        return
    if arm.name == plan.reference.name or plan.reference.equal:
        raise ConfigError(f"{where} equal = {arm.equal!r}: the budget is the reference's, which must not have one")
    if settings["lr_schedule"] != "constant":
        raise ConfigError(f"{where} equal = {arm.equal!r}: its end is not known before, so lr_schedule is constant")
    if arm.equal == "dollars" and not all(price(plan, one) for one in (arm, plan.reference)):
        raise ConfigError(f"{where} equal = 'dollars': needs dollars_per_hour in [cost]")


def price(plan: Plan, arm: Arm) -> float:
    """Dollars an hour of the machine that a run of this arm takes."""
    return arm.dollars_per_hour or plan.cost.dollars_per_hour


def _sized(plan: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan with its seeds and problems, `auto` replaced by what the power asks for."""
    path, seeds, problems = plan.path, values.get("seeds"), values.get("problems", 0)
    if seeds is None:
        raise ConfigError(f'{path}: seeds is missing: a list such as [0, 1, 2], a number, or "auto"')
    if problems != AUTO and (not _is_whole(problems) or problems == 1 or not 0 <= problems <= crossed.MOST_PROBLEMS):
        raise ConfigError(f'{path}: problems = {problems!r}: must be a number from 2 on, 0 for all, or "auto"')
    if seeds == AUTO:
        return _with_seeds(plan, problems)
    if _is_whole(seeds):
        seeds = list(range(min(seeds, crossed.MOST_SEEDS + 1)))
    if not isinstance(seeds, list) or not all(_is_whole(seed) and 0 <= seed <= config.MOST for seed in seeds):
        raise ConfigError(f'{path}: seeds = {values["seeds"]!r}: must be a list such as [0, 1, 2], a number, or "auto"')
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigError(f"{path}: seeds = {values['seeds']!r}: needs at least two, all different; one shows no noise")
    if len(seeds) > crossed.MOST_SEEDS:
        raise ConfigError(f"{path}: seeds: {crossed.MOST_SEEDS} are the most")
    plan = replace(plan, seeds=tuple(seeds))
    if problems != AUTO:
        return replace(plan, problems=problems)
    effect, goal = plan.power.effect, plan.power.power
    needed = crossed.problems_needed(effect, plan.noise, len(seeds), plan.strictest, goal)
    if needed is None:
        raise ConfigError(
            f"{path}: problems = 'auto': with {len(seeds)} seeds no number of problems finds a difference of "
            f"{effect:g}, since seeds alone vary by {plan.power.seed_sd:g}; plan more seeds"
        )
    return replace(plan, problems=needed, planned=("problems",))


def _with_seeds(plan: Plan, problems: Any) -> Plan:
    if problems in (0, AUTO):
        raise ConfigError(f"{plan.path}: seeds = 'auto' needs a number of problems: problems = 500")
    for n in range(2, crossed.MOST_SEEDS + 1):
        sized = replace(plan, seeds=tuple(range(n)), problems=problems, planned=("seeds",))
        if crossed.power(plan.power.effect, plan.noise, n, problems, sized.strictest) >= plan.power.power:
            return sized
    raise ConfigError(
        f"{plan.path}: seeds = 'auto': {crossed.MOST_SEEDS} seeds on {problems} problems do not find a difference of "
        f"{plan.power.effect:g}; plan more problems or a larger effect"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
