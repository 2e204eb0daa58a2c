"""The door: parses, calls, prints. No logic, and nothing heavy is imported before a command needs it.

Exit codes: 0 done; 2 a user's mistake, said in one line; 1 a job that failed; 130 Ctrl-C. A bug keeps its
traceback. stdout is data, stderr is talk; `--json` prints exactly one JSON object on stdout.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import gc
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_gsm8k import config, environment, interrupts, originals
from grpo_gsm8k.errors import ConfigError, GrpoError, Interrupted, ModelError, UserError
from grpo_gsm8k.flags import (
    HUB,
    RENT,
    RUN,
    SERVED,
    SERVICE,
    App,
    Commands,
    epilog,
    flags_of,
    help_all,
    mistake,
    nearest,
)
from grpo_gsm8k.launch import settings as launch_settings
from grpo_gsm8k.runs import progress, streams
from grpo_gsm8k.runs.clean import printable, printable_json
from grpo_gsm8k.serve import settings as serve_settings
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import load_examples

PATHS = frozenset(
    {errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP, errno.ENOSPC}
)
"""What a path that a person gave can be: none of these is a bug."""
# typer carries a click of its own, and does not export this
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = App(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": originals.name_here,  # --model_id = --model-id, --learning_rate = --lr
        "help_option_names": ["-h", "--help"],
    },
)

START, DATA, STAGE, AFTER, MACHINE = "Start here", "Data", "Stages", "Results and models", "Machines"
"""Panels of `grpo-gsm8k --help`."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"grpo-gsm8k {metadata.version('grpo-gsm8k')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """SFT → expert iteration → GRPO on GSM8K, on one node."""


Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def register(
    name: str,
    cls: type,
    call: Callable[..., Mapping[str, Any]],
    table: str = "",
    *,
    skip: tuple[str, ...] = (),
    into: typer.Typer = app,
    panel: str | None = None,
    reads: typing.Iterable[str] = (),
    lasts: bool = False,
) -> None:
    """A command whose flags are the fields of `cls`, which prints what `call(flags, **layers)` returns.

    `table` names the function of `evals.tables` that prints it for a person. `call`'s docstring is the command's
    help; its keyword parameters are flags too. `reads` are variables of the environment. One that `lasts` until it is
    told to end shows by itself what it is waiting for.
    """

    def command(as_json: bool, help_all: bool = False, **given: Any) -> None:
        layers = {key: given.pop(key) for key in inspect.signature(call).parameters if key != "flags"}
        with contextlib.nullcontext() if lasts else progress.doing(name):
            result = call({key: value for key, value in given.items() if value is not None}, **layers)
        show(result, as_json, table)
        if result.get("ok") is False:
            raise typer.Exit(1)

    own = list(inspect.signature(call, eval_str=True).parameters.values())[1:]
    json_flag = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    parameters = [*(p.replace(kind=p.KEYWORD_ONLY) for p in own), json_flag]
    if expert := [f.name for f in dataclasses.fields(cls) if f.metadata["expert"] and f.name not in skip]:
        parameters.append(help_all(expert))
    parameters += flags_of(cls, skip)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = call.__doc__
    into.command(name, rich_help_panel=panel, epilog=epilog(reads))(command)


def show(result: Mapping[str, Any], as_json: bool, table: str = "") -> None:
    """A command's result on stdout: one JSON object, or a table of `evals.tables`, or a line per key."""
    if as_json:
        print(printable_json(streams.as_json(result)))
        return
    if table:
        from grpo_gsm8k.evals import tables

        getattr(tables, table)(result)
        return
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{key}:")
            for item in value:
                print("  " + "  ".join(f"{k}={_short(v)}" for k, v in item.items()))
        else:
            print(f"{key}: {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "  ".join(f"{k}={_short(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return printable(str(value))


# ------------------------------------------------------------------------- the main path, and its stages

Preset = Annotated[str | None, typer.Option(help=f"one of {', '.join(config.preset_names())}")]
Recipe = Annotated[Path | None, typer.Option("--config", help="TOML recipe laid over the preset")]
Browse = Annotated[bool, typer.Option("--open", help="open the report in the browser")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value or stage.key=value; several times")]


def _pipeline(
    flags: Mapping[str, Any], config_file: Recipe = None, sets: Sets = None, browse: Browse = False
) -> Mapping[str, Any]:
    """All stages: base → SFT → expert iteration → GRPO → report."""
    from grpo_gsm8k import pipeline

    result = pipeline.run(config.build(config.PipelineConfig, flags), config_file, sets or ())
    if browse:
        _browse(Path(result["report"]))
    return result


def _demo(
    flags: Mapping[str, Any], config_file: Recipe = None, sets: Sets = None, browse: Browse = False
) -> Mapping[str, Any]:
    """A toy model learns to reason, on this machine, in minutes: `pipeline --preset tiny`."""
    return _pipeline(flags, config_file, sets, browse)


def _browse(page: Path) -> None:
    """Show a page in the browser, where there is one."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        _say(f"--open: no browser on this machine; the page is {page}")


def _stage(section: str, module: str, help: str, table: str = "", function: str = "run", panel: str = STAGE) -> None:
    def call(
        flags: Mapping[str, Any], preset: Preset = None, config_file: Recipe = None, sets: Sets = None
    ) -> Mapping[str, Any]:
        cfg = config.resolve(section, preset=preset, config_file=config_file, flags=flags, sets=sets or ())
        result: Mapping[str, Any] = getattr(importlib.import_module(f"grpo_gsm8k.{module}"), function)(cfg)
        return result

    call.__doc__ = help
    register(section, config.SECTIONS[section], call, table, panel=panel, reads=RUN if panel is STAGE else HUB)


register(
    "demo", config.PipelineConfig, _demo, "print_pipeline", skip=("preset", "data", "model_id"), panel=START, reads=RUN
)
register("pipeline", config.PipelineConfig, _pipeline, "print_pipeline", panel=START, reads=RUN)
_stage("sft", "sft", "Supervised fine-tuning on worked solutions.")
_stage("ei", "ei", "Expert iteration: sample, keep what is right, fine-tune, again.")
_stage("grpo", "grpo", "Group relative policy optimisation.")
_stage("distill", "distill", "On-policy distillation: a teacher scores the tokens that the student samples.")
_stage("eval", "fast_eval_vllm", "Accuracy of a model on a file of problems.", "print_eval", "command")
_stage(
    "prep-eval",
    "pretokenize",
    "An evaluation set as one model will see it: prompts rendered, golds checked.",
    panel=DATA,
)
_stage(
    "pairs",
    "tasks.gsm8k.pairs",
    "Teacher traces → pairs to fine-tune on: the right ones, in one prompt style.",
    panel=DATA,
)
_stage("tokenize", "pretokenize", "Pairs → shards of token ids for one model.", function="tokenize", panel=DATA)


# ------------------------------------------------------------------------------------------------- the rest


@app.command(rich_help_panel=DATA)
def data(
    out_dir: Annotated[Path, typer.Option(help="where train.jsonl, val.jsonl, test.jsonl and the manifest go")],
    source: Annotated[str, typer.Option(help="hub, or a folder with train.jsonl and test.jsonl")] = "hub",
    eval_n: Annotated[int, typer.Option(min=1, max=config.MOST, help="validation problems reserved from train")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=config.MOST, help="of the reservation")] = 31415,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help=f"a set by name instead: {', '.join(config.DATASETS)}")
    ] = "",
    task: Annotated[str, typer.Option(help="gsm8k, another task's name, or package.module:Class")] = "gsm8k",
    train_n: Annotated[
        int, typer.Option(min=1, max=config.MOST, help="training examples of a task that makes its own data")
    ] = 4096,
    test_n: Annotated[
        int, typer.Option(min=1, max=config.MOST, help="test examples of a task that makes its own data")
    ] = 512,
    revision: Annotated[str | None, typer.Option(help="of the hub's dataset; empty for the pinned one")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="where downloads are kept")] = None,
    snapshot_dir: Annotated[Path | None, typer.Option(help="keep the source files here as fetched")] = None,
    as_json: Json = False,
) -> None:
    """GSM8K, pinned and split: train, validation, test, and a manifest; or another task's data."""
    from grpo_gsm8k import data_prep

    if dataset:
        from grpo_gsm8k import eval_sets

        if task not in ("gsm8k", wanted := eval_sets.named(dataset).task):
            raise ConfigError(f"--task {task} with --dataset {dataset}: its task is {wanted}; leave --task out")
        how: dict[str, Any] = {"eval_n": eval_n, "seed": seed, "revision": revision or "", "cache_dir": cache_dir}
        show(eval_sets.prepare(dataset, out_dir, source, snapshot_dir=snapshot_dir, **how), as_json)
        return
    if task != "gsm8k":
        folder, sizes = ("" if source == "hub" else source), {"train": train_n, "val": eval_n, "test": test_n}
        made = data_prep.prepare_task(load_task(task), out_dir, folder, sizes, seed)
        show({**dataclasses.asdict(made), "manifest": str(made.manifest)}, as_json)
        return
    more = {} if revision is None else {"revision": revision}
    summary = data_prep.prepare(
        out_dir, source, eval_n=eval_n, seed=seed, cache_dir=cache_dir, snapshot_dir=snapshot_dir, **more
    )
    show({**dataclasses.asdict(summary), "manifest": str(summary.manifest)}, as_json)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=DATA,
)
def traces(context: typer.Context) -> None:
    """Teacher traces over HTTP, every paid answer kept exactly once; its flags: `traces --help`."""
    from grpo_gsm8k import r1_traces  # runs alone, too, so it reads its own flags

    raise typer.Exit(r1_traces.main(context.args))


@app.command(rich_help_panel=DATA)
def validate(
    data: Annotated[Path, typer.Option(help="chat JSONL: one {messages: [...]} a line; with --task, its rows")],
    task: Annotated[str, typer.Option(help="check the rows of a task's data instead")] = "",
    as_json: Json = False,
) -> None:
    """Check a chat JSONL, or a task's data; every fault with its line."""
    from grpo_gsm8k.tasks.conversations import check_chat

    if task:
        examples = load_examples(load_task(task), data)
        show({"ok": True, "rows": len(examples), "errors": []}, as_json)
        return
    found = check_chat(data)
    show({"ok": found.ok, "rows": found.rows, "errors": found.errors, "stats": found.stats}, as_json)
    if not found.ok:
        raise typer.Exit(2)


@app.command(rich_help_panel=AFTER)
def merge(
    model_id: Annotated[str, typer.Option(help="folder of a LoRA adapter, such as a checkpoint")],
    out_dir: Annotated[Path, typer.Option(help="where the model goes; must not exist")],
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto: bfloat16 on a GPU")] = "auto",
    as_json: Json = False,
) -> None:
    """A LoRA adapter and its base as one model, for whatever cannot load adapters."""
    from grpo_gsm8k import workbench

    show(workbench.merge(config.build(config.ModelConfig, {"model_id": model_id, "dtype": dtype}), out_dir), as_json)


@app.command(rich_help_panel=AFTER)
def push(
    model: Annotated[Path, typer.Argument(help="checkpoint folder in a run directory")],
    repo_id: Annotated[str, typer.Option(help="hub repository, owner/name")],
    public: Annotated[bool, typer.Option(help="make it public, or push to one that is; private otherwise")] = False,
    dry_run: Annotated[bool, typer.Option(help="show what would be uploaded; ask the hub nothing")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint with a model card written from its run."""
    from grpo_gsm8k.launch import publish

    show(publish.preview(model, repo_id) if dry_run else publish.push(model, repo_id, public), as_json)


def _export(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """A folder that serves a model elsewhere: on Modal (--modal), or on a GPU of one's own (--compose)."""
    from grpo_gsm8k.launch import deploy

    return deploy.export(flags)


register("export", launch_settings.ExportConfig, _export, panel=AFTER, reads=SERVED)


@app.command(rich_help_panel=AFTER)
def compare(
    results: Annotated[list[Path], typer.Argument(help="results files over the same problems")],
    gain: Annotated[float | None, typer.Option(help="a claimed gain in points; empty for the one seen")] = None,
    examples: Annotated[
        int, typer.Option(min=0, max=config.MOST, help="problems shown of those won, and of those lost")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Results files against the first, paired: how much better is B, and is it noise?"""
    from grpo_gsm8k.evals.compare import compare_files

    if gain is not None and (why := config.out_of_range(gain, {"at least": -100, "at most": 100})):
        raise ConfigError(f"--gain {gain}: {why} (a claimed gain in points)")

    show(compare_files(results, None if gain is None else gain / 100, examples), as_json, "print_comparison")


@app.command(rich_help_panel=DATA)
def contamination(
    files: Annotated[list[Path], typer.Argument(help="training files: any JSONL")],
    test: Annotated[Path, typer.Option(help="the test split")] = Path(config.DATA) / "test.jsonl",
    task: Annotated[str, typer.Option(help="whose test split it is")] = "gsm8k",
    ngram: Annotated[int, typer.Option(min=1, max=config.MOST, help="words in common that count")] = 13,
    examples: Annotated[int, typer.Option(min=0, max=config.MOST, help="overlaps shown of each file")] = 3,
    as_json: Json = False,
) -> None:
    """Test problems in training files: word n-grams that both have."""
    from grpo_gsm8k.tasks.contamination import check

    split = Path(config.found_data(str(test)) or test)
    show(check(files, split, load_task(task), ngram, examples), as_json, "print_contamination")


@app.command(rich_help_panel=AFTER)
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories")],
    out: Annotated[
        Path | None, typer.Option(help="the page; by default report.html, for several runs comparison.html")
    ] = None,
    browse: Browse = False,
    as_json: Json = False,
) -> None:
    """One self-contained HTML page about one run or several."""
    from grpo_gsm8k.report import parted, write_report

    with progress.doing("report"):
        page, words = write_report(runs, out), parted(runs)
    show({"path": str(page), **({"parted": words} if words else {})}, as_json)
    if browse:
        _browse(page)


@app.command(rich_help_panel=AFTER)
def study(
    plan: Annotated[Path, typer.Argument(help="the plan: arms, seeds, problems, in TOML")],
    out_dir: Annotated[
        Path | None, typer.Option(help="the study's folder; empty for artifacts/studies/<name of the plan>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the study that is there")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="runs at a time")] = 1,
    max_runs: Annotated[int, typer.Option(min=0, max=config.MOST, help="start so many runs at most; 0: all")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="show runs, tokens, time and cost; make nothing")] = False,
    simulate: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="instead, simulate so many studies and count wrong verdicts")
    ] = 0,
    browse: Browse = False,
    as_json: Json = False,
) -> None:
    """Arms × seeds by a plan: runs, a paired analysis, and one page with the answer."""
    from grpo_gsm8k import study as studies

    with progress.doing("study"):
        if dry_run:
            result, table = studies.dry_run(plan, out_dir), "print_dry_run"
        elif simulate:
            result, table = studies.simulate(plan, simulate), "print_simulated"
        else:
            result = studies.run(plan, out_dir, resume=resume, jobs=jobs, max_runs=max_runs)
            table = "print_study"
    show(result, as_json, table)
    if browse and not (dry_run or simulate):
        _browse(Path(result["path"]))


RunDir = Annotated[Path, typer.Argument(help="directory of a training run")]
OwnCode = Annotated[
    bool, typer.Option("--own_code", help="import the reward, task or loss that the run names, from this directory")
]
DataNow = Annotated[str, typer.Option(help="where the run's data are now, if they moved without it")]
ModelNow = Annotated[str, typer.Option(help="where the model is now that the run began with")]


@app.command(rich_help_panel=AFTER)
def replay(
    run: RunDir,
    step: Annotated[int, typer.Option(min=1, max=config.MOST, help="the step to train again")],
    own_code: OwnCode = False,
    data: DataNow = "",
    model_id: ModelNow = "",
    as_json: Json = False,
) -> None:
    """Train a step of a run again, from its checkpoint and rollouts: the weights must be the same."""
    from grpo_gsm8k.audit.replay import replay as train_again

    with progress.doing("replay"):
        result = train_again(run, step, own_code, data, model_id)
    show(result, as_json)
    if result["verdict"] == "different":
        raise typer.Exit(1)


@app.command(rich_help_panel=AFTER)
def fork(
    run: RunDir,
    at: Annotated[int, typer.Option(min=0, max=config.MOST, help="step of the checkpoint to go on from; 0: its start")],
    sets: Sets = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="the fork's directory; empty for artifacts/runs/<UTC stamp>_<git sha>")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=0, max=config.MOST, help="stop after this many steps; 0 for all")] = 0,
    as_json: Json = False,
) -> None:
    """Go on from a checkpoint with other settings: the same prompts and draws until the policies part."""
    from grpo_gsm8k.audit.fork import fork as go_on

    with progress.doing("fork"):
        result = go_on(run, at, sets or (), out_dir, max_steps)
    show(result, as_json)


@app.command(rich_help_panel=AFTER)
def verify(
    run: Annotated[Path, typer.Argument(help="directory of a training run, or of a pipeline")],
    steps: Annotated[
        int,
        typer.Option(min=0, max=config.MOST, help="steps of each training stage that are sampled and trained again"),
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, max=config.MOST, help="draws these steps")] = 0,
    head: Annotated[str, typer.Option(help="last hash of the run's chain, as its author published it")] = "",
    own_code: OwnCode = False,
    data: DataNow = "",
    model_id: ModelNow = "",
    as_json: Json = False,
) -> None:
    """Hold a run to its word: every byte, every grade, and some steps sampled and trained again."""
    from grpo_gsm8k.audit import verify as audit

    asked = audit.Options(steps, seed, own_code, data, model_id, head)
    with progress.doing("verify"):
        result = audit.verify(run, asked)
    if as_json:
        show(result, True)
    else:
        print(printable("\n".join(audit.lines_of(result))))
    if not result["ok"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=START)
def doctor(
    model_id: Annotated[str, typer.Option(help="also try what every stage tries of this model before it starts")] = "",
    device: Annotated[str, typer.Option(help="where the model is tried: auto, cpu or cuda:N")] = "auto",
    prompt_style: Annotated[str, typer.Option(help="how the model is asked, as in the stages")] = "auto",
    gpu: Annotated[
        bool, typer.Option("--gpu", help="measure the GPU instead, see bench gpu: numbers, speed, memory")
    ] = False,
    budget_s: Annotated[float, typer.Option("--budget-s", help="with --gpu: seconds in all")] = 540.0,
    parts: Annotated[str, typer.Option(help="with --gpu: some of the parts, separated by commas")] = "all",
    devices: Annotated[int, typer.Option(help="with --gpu: 2 also tries two GPUs together")] = 1,
    out_dir: Annotated[
        str, typer.Option("--out-dir", help="with --gpu: folder of gpu.json and gpu.md")
    ] = "artifacts/gpu",
    as_json: Json = False,
) -> None:
    """What this machine can run, and what to do about the rest; of a model, whether it is served exactly."""
    if gpu:
        _measure_gpu("cuda" if device == "auto" else device, budget_s, parts, devices, out_dir, as_json)
        return
    from grpo_gsm8k.doctor import checks, model_checks

    of_model = model_checks(model_id, device, prompt_style) if model_id else []
    found = checks() + of_model
    if as_json:
        show({"checks": [dataclasses.asdict(check) for check in found]}, True)
    else:
        _print_checks(found)
    if failed := next((check for check in of_model if not check.ok), None):
        raise ModelError(failed.detail)


@app.command(rich_help_panel=START)
def env(as_json: Json = False) -> None:
    """Versions, machine, commit and settings of the environment, for a bug report; no names, no paths, no keys."""
    from grpo_gsm8k.doctor import bug_report

    with progress.doing("env"):
        found = bug_report()
    show(found, as_json)


def _measure_gpu(device: str, budget_s: float, parts: str, devices: int, out_dir: str, as_json: bool) -> None:
    from grpo_gsm8k import bench
    from grpo_gsm8k.bench import gpu

    given = ["gpu", f"--device={device}", f"--budget_s={budget_s}", f"--parts={parts}", f"--devices={devices}"]
    toys = ["--sizes=toy"] if device == "cpu" else []
    args = bench.parser().parse_args([*given, f"--out={out_dir}", *toys])
    bench.check(args)
    found = gpu.run(args)
    if as_json:
        show(found, True)
    else:
        print(gpu.markdown(found))
    if any(part["status"] == "failed" for part in found["parts"].values()):
        raise typer.Exit(1)


def _print_checks(found: typing.Iterable[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "check", "detail", box=None)
    for check in found:
        table.add_row("[green]ok[/]" if check.ok else "[yellow]--[/]", check.name, check.detail)
    Console().print(table)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MACHINE,
)
def bench(context: typer.Context) -> None:
    """Benchmarks: update, sample, step, gpu. As `python -m grpo_gsm8k.bench` they need torch and transformers only."""
    from grpo_gsm8k.bench import main as run

    run(context.args)


def _serve(
    flags: Mapping[str, Any],
    status: Annotated[bool, typer.Option("--status", help="print what a running server is doing instead")] = False,
) -> Mapping[str, Any]:
    """The training service: one server that speaks Tinker, OpenAI and rewards over HTTP."""
    from grpo_gsm8k import serve

    return serve.run(config.build(serve_settings.ServeConfig, flags), status)


register("serve", serve_settings.ServeConfig, _serve, panel=MACHINE, reads=(*HUB, *SERVICE), lasts=True)


objective_app = App(cls=Commands, help="Losses and advantages, judged exactly.", no_args_is_help=True)
app.add_typer(objective_app, name="objective", rich_help_panel=AFTER)

OF_AN_OBJECTIVE = {
    *("algorithm", "advantage_eps", "old_logprobs", "importance_correction", "importance_cap", "importance_cap_low"),
    *("temperature", "top_p", "epochs", "minibatches", *config.ALGORITHMS["grpo"]),
}
"""Fields of GRPO's config that say what an update's gradient is."""


def _objective_check(
    flags: Mapping[str, Any],
    own: Annotated[str, typer.Argument(metavar="LOSS", help="the loss, as --loss takes it")] = "",
    preset: Preset = None,
    config_file: Recipe = None,
    sets: Sets = None,
    group_size: Annotated[int, typer.Option(help="completions per prompt, from 2 to 6")] = 4,
    every: Annotated[bool, typer.Option("--all", help="a table of every shipped algorithm instead")] = False,
) -> Mapping[str, Any]:
    """Exact bias and variance of an objective's gradient, on a task that can be enumerated; exit code 1 for a bug."""
    from grpo_gsm8k import objective

    if every:
        return objective.table(group_size)
    flags = {**flags, **({"loss": own} if own else {})}
    cfg = config.resolve("grpo", preset=preset, config_file=config_file, flags=flags, sets=sets or ())
    return objective.check(cfg, group_size)


register(
    "check",
    config.GrpoConfig,
    _objective_check,
    "print_objective",
    skip=tuple(f.name for f in dataclasses.fields(config.GrpoConfig) if f.name not in OF_AN_OBJECTIVE),
    into=objective_app,
)

PIPELINE = dict.fromkeys(("pipeline", "demo"), ("sft", "ei", "grpo", "eval"))
"""Commands of several stages, each with settings of its own."""

config_app = App(cls=Commands, help="Settings and where they come from.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel=START)


@config_app.command("show", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def config_show(
    context: typer.Context,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="sft, ei, grpo, eval, …, or pipeline for all of its stages")
    ],
) -> None:
    """What a command would run with, and the layer that set each value: `config show grpo --preset quick --lr 1e-6`.

    Behind STAGE stand the flags that the command itself takes. The output is a recipe for --config; with --json it is
    one object.
    """
    group: Any = context.find_root().command
    command = group.get_command(context, stage)
    sections = [command.name] if command and command.name in config.SECTIONS else list(PIPELINE.get(stage, ()))
    if not sections:
        raise ConfigError(f"config show {stage}: no stage{nearest(stage, [*config.SECTIONS, *PIPELINE])}")
    with command.make_context(f"config show {stage}", list(context.args), parent=context.find_root()) as asked:
        given = {key: value for key, value in asked.params.items() if value is not None}
    as_json, own = given.pop("as_json"), {key: given.pop(key, None) for key in ("preset", "config_file", "sets")}
    given = {key: value for key, value in given.items() if key not in ("help_all", "browse")}
    found = _explained(stage, sections, given, own["preset"], own["config_file"], own["sets"] or ())
    if as_json:
        parts = ("value", "layer", "where")
        told = {name: {key: dict(zip(parts, (vars(cfg)[key], *origin[key]), strict=True)) for key in origin}
                for name, (cfg, origin) in found.items()}  # fmt: skip
        show({"stage": stage, "settings": told}, True)
    else:
        print("\n".join(config.to_toml(cfg, name, origin) for name, (cfg, origin) in found.items()), end="")


def _explained(
    stage: str,
    sections: typing.Iterable[str],
    flags: Mapping[str, Any],
    preset: str | None,
    config_file: Path | None,
    sets: typing.Sequence[str],
) -> dict[str, config.Explained]:
    """Section → its config and the layer of each value, as a command with these flags would have them."""
    if stage not in PIPELINE:
        how = {"preset": preset, "config_file": config_file, "flags": flags, "sets": sets}
        return {section: config.explain(section, **how) for section in sections}
    from grpo_gsm8k import pipeline

    flags = {**flags, **({"preset": preset} if preset else {})}
    return {section: pipeline.explain(section, flags, config_file, sets) for section in sections}


# ------------------------------------------------------------------------------------------------ rented GPUs

launch_app = App(cls=Commands, help="Rented GPUs: a pod is made, does one job, and is deleted.", no_args_is_help=True)
app.add_typer(launch_app, name="launch", rich_help_panel=MACHINE)

StateDir = Annotated[Path, typer.Option(help="where runs are recorded on this machine")]
RunName = Annotated[str, typer.Argument(help="name of a run, or the beginning of it")]
RECORDS = Path(launch_settings.UpConfig.state_dir)


def _up(
    flags: Mapping[str, Any],
    dry_run: Annotated[bool, typer.Option(help="show what would be asked for and run, and rent nothing")] = False,
    command: Annotated[list[str] | None, typer.Argument(help="the job, behind --")] = None,
) -> Mapping[str, Any]:
    """Rent a pod, run a job on it, fetch what it made, delete the pod: launch up --budget 5 --image … -- COMMAND."""
    if dry_run:
        from grpo_gsm8k.launch.dry_run import rehearse

        return rehearse(flags, command or ())
    from grpo_gsm8k.launch.up import up

    return up(flags, command or ())


def _plan(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which GPUs suffice for a model, at what price now, for how long: an estimate. Nothing is rented."""
    from grpo_gsm8k.launch.plan import plan

    return plan(flags)


register("plan", launch_settings.PlanConfig, _plan, into=launch_app, reads=RENT[:3])
register("up", launch_settings.UpConfig, _up, into=launch_app, reads=RENT)


def _sky(
    flags: Mapping[str, Any],
    nodes: Annotated[int, typer.Option(min=1, max=1024, help="machines")] = 1,
    out: Annotated[Path, typer.Option(help="where the task goes")] = Path("task.yaml"),
    command: Annotated[list[str] | None, typer.Argument(help="the job, behind --")] = None,
) -> Mapping[str, Any]:
    """The same job as a SkyPilot task: `sky jobs launch task.yaml`."""
    from grpo_gsm8k.launch.sky import write_task

    return {"path": str(write_task(flags, command or (), nodes, out))}


register("sky", launch_settings.UpConfig, _sky, into=launch_app)


@launch_app.command("status")
def launch_status(state_dir: StateDir = RECORDS, as_json: Json = False) -> None:
    """Pods of this project, and runs on record here that have not ended."""
    from grpo_gsm8k.launch import manage

    show(manage.status(state_dir), as_json)


@launch_app.command("logs")
def launch_logs(run: RunName, state_dir: StateDir = RECORDS) -> None:
    """The log of a run's job."""
    from grpo_gsm8k.launch import manage

    manage.logs(state_dir, run)


@launch_app.command("attach")
def launch_attach(run: RunName, state_dir: StateDir = RECORDS, as_json: Json = False) -> None:
    """Go on with a run whose launcher is gone: follow its job, fetch, delete the pod."""
    from grpo_gsm8k.launch import manage

    show(manage.attach(state_dir, run), as_json)


@launch_app.command("down")
def launch_down(
    run: RunName,
    dry_run: Annotated[bool, typer.Option(help="list what would be deleted, and delete nothing")] = False,
    state_dir: StateDir = RECORDS,
    as_json: Json = False,
) -> None:
    """Delete a run's pod, whatever it is doing."""
    from grpo_gsm8k.launch import manage

    show(manage.down(state_dir, run, dry_run=dry_run), as_json)


@launch_app.command("reap")
def launch_reap(
    everything: Annotated[bool, typer.Option("--all", help="also pods within their deadline")] = False,
    yes: Annotated[bool, typer.Option(help="with --all: pods of other machines and people, too, unasked")] = False,
    dry_run: Annotated[bool, typer.Option(help="list what would be deleted, and delete nothing")] = False,
    state_dir: StateDir = RECORDS,
    as_json: Json = False,
) -> None:
    """Delete pods of this project that outlived their deadline, from any machine that has the key."""
    from grpo_gsm8k.launch import manage

    show(manage.reap(state_dir, everything, yes=yes, dry_run=dry_run), as_json)


def main(argv: list[str] | None = None) -> None:
    """The console script. Errors of `errors.py` become one line and an exit code."""
    # OpenMP's threads spin while they wait. Where processes share cores that is ruinous: two of two threads each,
    # on two cores, were measured at 0.15 steps a second, and at 4.1 with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch and transformers make half a million objects that stay. Python's collector would walk them again and again
    # while they are imported, which was measured at a fifth of a start, and once more at the exit, for a second.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    streams.serve_any_encoding()
    try:
        code = _run(argv)
    finally:
        interrupts.over()
    if interrupts.received():
        interrupts.leave(code)
    if code:
        raise SystemExit(code)


def _run(argv: list[str] | None) -> int:
    """The command's exit code; what a person can mend becomes one line."""
    try:
        with streams.stdout_errors():
            for wrong in environment.load():
                _say(wrong)
            code = app.tree(argv, prog_name="grpo-gsm8k", standalone_mode=False) or 0
        if code != 130:  # what typer makes of a KeyboardInterrupt
            return int(code)
        _say(interrupts.LINE)
    except Interrupted as stop:
        _say(str(stop))
        return stop.exit_code
    except GrpoError as fault:
        _say(f"{'error' if isinstance(fault, UserError) else 'failed'}: {fault}")
        return fault.exit_code
    except OSError as fault:
        if fault.errno not in PATHS or fault.filename is None:
            raise
        _say(f"error: {os.fsdecode(fault.filename)}: {fault.strerror}; give another path")
        return UserError.exit_code
    except ClickException as fault:
        if type(fault).__name__ == "NoArgsIsHelpError":
            fault.show()
        else:
            command = getattr(getattr(fault, "ctx", None), "command_path", "grpo-gsm8k")
            flag = str(getattr(fault, "option_name", ""))
            renamed = originals.RENAMED.get(flag) if type(fault).__name__ == "NoSuchOption" else None
            _say(f"error: {f'{flag}: {renamed}' if renamed else mistake(fault)}; see `{command} --help`")
        return int(fault.exit_code)
    except KeyboardInterrupt:
        _say(interrupts.LINE)
    return interrupts.exit_code()


def run_command(name: str) -> None:
    """`python -m grpo_gsm8k.<stage>`: the same command with the same flags."""
    main([name, *sys.argv[1:]])


def _say(message: str) -> None:
    print(printable(" ".join(message.split())), file=sys.stderr)


if __name__ == "__main__":
    main()
