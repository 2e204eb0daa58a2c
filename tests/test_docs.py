"""An outsider's test of README, CONTRIBUTING and docs/: every command parses, every name is there, every link leads on.

Commands are parsed by the real command line, with the real checks of their settings, and not executed. Blocks after
`<!-- test: run -->` are executed under --runslow.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_gsm8k import bench, cli, config, data_prep, r1_traces
from grpo_gsm8k.datatypes import Completion, Grade, Prompt, Trajectory
from grpo_gsm8k.grpo import advantages_of
from grpo_gsm8k.runs import diagnosis
from grpo_gsm8k.study.plan import read_plan
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.rewards import Grader, make_reward
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.losses import make_loss
from tests.toys import rows, stage_config, word_problem

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grpo_gsm8k"
DOCS = ROOT / "docs"
ELSEWHERE = {"originals.md"}  # full of other programs' names; tests/test_originals.py types it row by row
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(p for p in DOCS.glob("*.md") if p.name not in ELSEWHERE)]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS, GROUPS = set(PYPROJECT["project"]["optional-dependencies"]), set(PYPROJECT["dependency-groups"])
OTHER_TOOLS = {"bash", "git", "cd", "export", "ssh", "ruff", "mypy", "mkdocs", "pre-commit", "uvx", "curl"}
OTHER_TOOLS |= {"tensorboard", "trackio"}
OTHER_FLAGS = {"--help", "--extra", "--group", "--torch-backend", "--runslow", "--strict", "--apply-chat-template"}
OTHER_FLAGS |= {"--generation-config"}  # vLLM's
OTHER_FLAGS |= {"--gpus", "--shm-size", "--max-restarts", "--shutdown-timeout"}  # docker's and torchrun's
METRICS = "time|perf|policy|mismatch|staleness|sync|eval|groups|outcome|length|reward|ei|diversity|val"
METRICS += "|distill|curriculum"
NOT_HERE = {"mine.py", "config.toml", "/pre_start.sh", "/post_start.sh", "gsm8k.yaml"}  # the user's, lm-eval's


# ------------------------------------------------------------------------------------------ reading a page


def blocks(page: Path) -> list[tuple[str, str, bool]]:
    """Fenced blocks: language, text, and whether the page asks for them to be run."""
    found = re.findall(r"(<!-- test: run -->\n)?^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [(language, text, bool(run)) for run, language, text in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What stands in code type in the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """The tables, each a list of rows by column."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), flags=re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines())
        yield [dict(zip(head, row, strict=False)) for row in rows]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text, as words; `$(…)` becomes one word, a capital letter or … a 1."""
    text = re.sub(r"\$\([^)]*\)", "X", text.replace("\\\n", " "))
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|"):
                if words:
                    yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):  # a variable before a command
                words.append("1" if re.fullmatch("[A-Z]|…", word) else word)


def shell_texts(page: Path) -> Iterator[str]:
    """Everything on a page that a reader may type into a shell."""
    for language, text, _ in blocks(page):
        if language == "bash":
            yield text
        elif language == "yaml":
            task = yaml.safe_load(text)
            yield from (task[key] for key in ("setup", "run") if key in task)
    begins = ("uv run ", "scripts/uv ", "grpo-gsm8k ", "python -m ", "pytest ", "uv sync ")
    yield from (span for span in spans(page) if span.startswith(begins) and "…" not in span)


# --------------------------------------------------------------------------------------- checking a command


def check(words: Sequence[str]) -> None:
    """Raise, or fail an assertion, unless the command exists and takes these arguments."""
    program, *rest = words
    if program in ("uv", "scripts/uv"):
        check_uv(rest)
    elif program.endswith("grpo-gsm8k"):
        check_cli(rest)
    elif program == "docker":
        check_docker(rest)
    elif program == "torchrun":
        check_module(rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :])
    elif program == "python":
        if rest[0] == "-c":
            compile(rest[1], "python -c", "exec")
        elif rest[0] == "-m":
            check_module(rest[1], rest[2:])
        elif rest[0] == "grpo_gsm8k/r1_traces.py":
            r1_traces.parse_flags(rest[1:])
        elif not rest[0].startswith("deploy/"):  # what `export` writes
            check_source(ROOT / rest[0], rest[1:])
    elif program == "pytest":
        check_pytest(rest)
    else:
        assert program in OTHER_TOOLS, f"unknown program {program}"


def check_uv(words: Sequence[str]) -> None:
    command, *rest = words
    assert command in ("run", "sync", "lock", "venv", "pip"), command
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--extra", "--group", "--only-group", "--with", "--python"):
            name = rest.pop(0)
            assert option != "--extra" or name in EXTRAS, name
            assert "group" not in option or name in GROUPS, name
    if command == "run" and rest:
        check(rest)


def check_docker(words: Sequence[str]) -> None:
    if words[:2] == ["compose", "--file"]:  # one that a command writes
        assert words[2].endswith("compose.yaml"), words
    elif words[0] == "compose":
        assert words[-1] in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"], words
    elif words[0] == "run" and words.count("grpo-gsm8k") == 2:  # the image, then the command
        check(words[len(words) - words[::-1].index("grpo-gsm8k") - 1 :])


def check_module(module: str, words: Sequence[str]) -> None:
    top, _, name = module.partition(".")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / module.replace(".", "/")).is_dir()
    if module == "grpo_gsm8k.cli":
        check_cli(words)
    elif module == "grpo_gsm8k.data_prep":
        data_prep.flags().parse_args(words)
    elif top == "grpo_gsm8k":
        check_cli([name, *words])
    else:
        check_source((ROOT / module.replace(".", "/")).with_suffix(".py"), words)


def check_source(path: Path, words: Sequence[str]) -> None:
    """A script with flags of its own: they stand in its source."""
    source = path.read_text()
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in source, f"{path.name} has no {word}"


def check_pytest(words: Sequence[str]) -> None:
    files = [ROOT / word for word in words if word.endswith(".py")]
    assert all(path.is_file() for path in files), words
    if "-k" in words and files:
        assert words[words.index("-k") + 1] in files[0].read_text(), words


def check_cli(words: Sequence[str]) -> None:
    """Parse as the console script would, check the settings as the stage would, and stop there."""
    if words[:1] == ["traces"]:
        r1_traces.parse_flags(words[1:])
    elif words[:1] == ["bench"]:
        bench.parser().parse_args(words[1:])
    else:
        words, job = (list(words), []) if "--" not in words else split_at(words, "--")
        name, params = parsed([word for word in words if word != "--help"])
        check_settings(name, params)
        if job:  # flags alone belong to the training that `launch up --model_id` makes
            check(["grpo-gsm8k", "grpo", *job] if job[0].startswith("-") else job)


def split_at(words: Sequence[str], mark: str) -> tuple[list[str], list[str]]:
    at = list(words).index(mark)
    return list(words[:at]), list(words[at + 1 :])


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that these words name, and its parameters."""
    command = cli.app.tree
    context, names = None, []
    while hasattr(command, "commands"):
        context = command.make_context("grpo-gsm8k", [], parent=context, resilient_parsing=True)
        if not words or words[0].startswith("-"):
            known = {flag for parameter in command.params for flag in parameter.opts}
            assert set(words) <= known, f"no flag {words}"
            return " ".join(names), {}
        names.append(words.pop(0))
        found = command.get_command(context, names[-1])
        assert found, f"no command {' '.join(names)}"
        command = found
    return " ".join(names), command.make_context(names[-1], words, parent=context).params


def check_settings(name: str, params: dict[str, Any]) -> None:
    given = {key: value for key, value in params.items() if value is not None}
    layers = {"as_json", "preset", "config_file", "sets", "help_all", "browse"}
    if name in config.SECTIONS:
        flags = {key: value for key, value in given.items() if key not in layers}
        config.resolve(name, preset=given.get("preset"), flags=flags, sets=given.get("sets", ()))
    elif name in ("pipeline", "demo"):
        flags = {key: value for key, value in given.items() if key not in layers - {"preset"}}
        cfg = config.build(config.PipelineConfig, flags)
        for section in ("sft", "ei", "grpo", "eval"):
            config.resolve(section, preset=cfg.preset, sets=given.get("sets", ()))


# ------------------------------------------------------------------------------------------------ the names


@functools.cache
def all_flags() -> frozenset[str]:
    """Every flag of every command, spelled with `-`."""
    found: set[str] = set()

    def walk(command: Any) -> None:
        for parameter in command.params:
            found.update([*parameter.opts, *parameter.secondary_opts])
        for below in getattr(command, "commands", {}).values():
            walk(below)

    walk(cli.app.tree)
    found.update(f"--{field.name}" for field in r1_traces.fields(r1_traces.Settings))
    for path in [
        *PACKAGE.glob("bench/**/*.py"),
        *PACKAGE.glob("launch/templates/*.py"),
        *(ROOT / "scripts").glob("*.py"),
        ROOT / "tests" / "fake_api.py",
    ]:
        found.update(re.findall(r'"(--[a-z_]+)"', path.read_text()))
        found.update(f"--{name}" for name in re.findall(r'^    "([a-z_]+)": \(', path.read_text(), flags=re.M))
    return frozenset(flag.replace("_", "-") for flag in found) | OTHER_FLAGS


@functools.cache
def defined_in(path: Path) -> frozenset[str]:
    """Functions, classes, `Class.method`, fields and constants of a module."""
    found: set[str] = set()

    def visit(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(found)


def module(name: str) -> Path:
    """A file named from the root or from the package."""
    found = next((folder / name for folder in (ROOT, PACKAGE) if (folder / name).is_file()), None)
    assert found, f"{name} does not exist"
    return found


@functools.cache
def package_source() -> str:
    return "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))


@functools.cache
def package_strings() -> str:
    """The package's source, strings that continue on the next line put together."""
    return re.sub(r'"\s*\n\s*f?"', "", package_source())


def slug(heading: str) -> str:
    """The anchor of a heading, on GitHub and on the site."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.M)}


# ------------------------------------------------------------------------------------------------ the tests


@every_page
def test_every_command_exists_and_takes_its_flags(page):
    for text in shell_texts(page):
        for words in commands(text):
            try:
                check(words)
            except BaseException as fault:
                fault.add_note(f"{page.name}: {' '.join(words)}")
                raise


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("uv run grpo-gsm8k sfft", "no command sfft"),
        ("uv run grpo-gsm8k grpo --grupo_size 8", "No such option"),
        ("uv run grpo-gsm8k grpo --algorithm dappo", "unknown algorithm"),
        ("uv run grpo-gsm8k sft --preset big", "unknown preset"),
        ("uv run grpo-gsm8k grpo --steps many", "unable to parse string as an integer"),
        ("uv run grpo-gsm8k pipeline --set grpo.step=3", "unknown key"),
        ("uv run grpo-gsm8k merge --model_id M", "Missing parameter: out_dir"),
        ("uv run --extra vlm grpo-gsm8k eval", "vlm"),
        ("cd x && FOO=1 uv run pytest tests/test_nothing.py", "test_nothing"),
        ("uv run python -m grpo_gsm8k.nothing", "assert"),
        ("uv run torchrun --nproc-per-node 4 -m grpo_gsm8k.cli sft --prest full", "No such option"),
        ("python grpo_gsm8k/r1_traces.py --infiles f", "no such flag: --infiles (did you mean --infile?)"),
        ("docker run --rm grpo-gsm8k grpo-gsm8k doctors", "no command"),
        ("grpo-gsm8k launch up --budget 5 -- grpo-gsm8k nothing", "no command"),
        ("make install", "unknown program"),
    ],
)
def test_the_checker_finds(line, fault):
    with pytest.raises(Exception, match=re.escape(fault)):
        for words in commands(line):
            check(words)


@every_page
def test_files_flags_and_metrics_that_are_named_exist(page):
    for span in spans(page):
        if span in NOT_HERE or span.startswith("deploy/"):
            continue
        if re.fullmatch(r"[\w./-]+\.(py|sh|yml|yaml|toml|svg)", span):
            module(span)
        elif re.fullmatch(r"(scripts|tests|docs|grpo_gsm8k)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert flag.replace("_", "-") in all_flags(), f"no command has {flag}"
        if re.fullmatch(rf"({METRICS})/\w+", span):
            assert f'"{span}"' in package_source(), f"nothing logs {span}"


@every_page
def test_functions_that_are_named_with_their_file_exist(page):
    for table in tables(page):
        if {"file", "function"} <= table[0].keys():
            for row in table:
                defined = defined_in(module(row["file"].strip("`")))
                missing = set(re.findall(r"`([^`]+)`", row["function"])) - defined
                assert not missing, f"{row['file']} has no {missing}"
    for name, file in re.findall(r"`([A-Za-z_][\w.]*)`\s+in\s+\[?`([\w/]+\.py)`", prose(page)):
        assert name in defined_in(module(file)), f"{file} has no {name}"


def test_the_journey_is_checked():
    journey = next(t for t in tables(DOCS / "architecture.md") if "function" in t[0])
    assert len(journey) >= 15 and journey[0]["file"].startswith("`")


@every_page
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@every_page
def test_other_blocks_can_be_read(page, tmp_path, monkeypatch):
    for language, text, _ in blocks(page):
        if language == "toml":
            (tmp_path / "recipe.toml").write_text(text)
            (read_plan if "arms = " in text else config.read_toml)(tmp_path / "recipe.toml")
        elif language == "yaml":
            yaml.safe_load(text)
        elif language == "python":
            (tmp_path / "mine.py").write_text(text)
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
            monkeypatch.delitem(sys.modules, "mine", raising=False)
            if "Task" in text:
                graded = load_task("mine:Shout").grade(word_problem("a", "hi", "", "HI"), "HI ")
                assert graded.correct and graded.reward == 1.0
            elif "short_and_right" in text:
                said = Completion((5, 6), (0.0, 0.0), "It is 72.", "stop")
                group = [Trajectory.of(Prompt(word_problem("a", "", "", "72"), (1,)), said)]
                ((found,),) = Grader(load_task("gsm8k"), make_reward("mine:short_and_right")).grade([group])
                assert found.reward == pytest.approx(1.05)
            else:
                batch = make_batch(rows(([1, 2], 1), advantage=2.0, logprob=-1.0))
                loss = make_loss("mine:Clipped", {"clip_eps": 0.5})(torch.tensor([[0.0]]), batch)
                assert float(loss) == pytest.approx(-3.0)
                best = advantages_of(stage_config("grpo", advantage="mine:best_only"), [Grade(1.0), Grade(0.2)])
                assert best == [1.0, 0.0]
        else:
            assert language in ("bash", ""), language


def test_the_trees_name_what_is_there():
    tree = next(text for _, text, _ in blocks(ROOT / "README.md") if text.startswith("grpo_gsm8k/"))
    shown = {name.rstrip("/") for name in re.findall(r"\w+\.py|(?<!\S)\w+/(?=\s)", tree)} - {"grpo_gsm8k"}
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert shown <= there
    left_out = {"__init__.py", "__pycache__", "doctor.py", "repro.py", "plugins.py"}
    assert {n for n in there - shown if not n.startswith(("bench", "report"))} <= left_out


def test_the_findings_are_those_of_the_diagnosis():
    rows = next(t for t in tables(DOCS / "troubleshooting.md") if "finding" in t[0])
    names = [row["finding"].strip("`") for row in rows]
    assert set(names) == {check.__name__ for check in (*diagnosis.CHECKS, diagnosis.stalled)}
    assert len(names) == len(set(names))


def test_what_would_have_gone_wrong_on_a_gpu_has_its_tests():
    rows = next(t for t in tables(DOCS / "performance.md") if "finding" in t[0])
    assert {int(row[""]) for row in rows} == set(range(1, 15))
    source = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row["test"])
        assert named and row["what a user would have seen"], row
        for name in named:
            assert f"\ndef {name}(" in source, f"there is no {name}"


NO_DEFAULT_OF_SPEED = {
    *("grading", "max_new_tokens", "seed", "log", "wandb_project", "run_name", "engine_patience_s", "data", "out_dir"),
    *("resume", "max_steps", "save_every", "keep_last", "keep_rollouts", "eval_every", "eval_examples"),
    *("eval_set_path", "eval_device"),
    *("lora_rank", "lora_alpha", "lora_targets", "grader_processes", "grader_timeout_s", "eval_draw"),
    *("learner", "wire_loss"),
    *("eval_backlog", "probe_tolerance", "lr", "lr_schedule", "warmup_steps", "weight_decay", "beta1", "beta2"),
    *("grad_clip", "keep_rollouts"),
}
"""Fields that say what is learned and where it is kept, not how fast."""


def test_every_default_says_what_it_was_chosen_by():
    """All fields of the samplers' and learners' configs; a new one is put on the page, or on the list above."""
    mine = [
        vars(cls).get("__annotations__", {})
        for cls in config.TrainConfig.__mro__
        if issubclass(cls, config.ModelConfig)
    ]
    fields = {name for names in mine for name in names if name.islower()} - NO_DEFAULT_OF_SPEED | {"mode"}
    declared = config.GrpoConfig.__dataclass_fields__
    first, second = (t for t in tables(DOCS / "performance.md") if {"flag", "default"} <= t[0].keys())
    assert {row["flag"].strip("`-") for row in second} == fields
    for row in (*first, *second):
        default = declared[row["flag"].strip("`-")].default
        assert row["default"] == (f"`{default}`" if default != "" else ""), row
    for row in second:
        for device in ("on a CPU", "on a GPU"):
            assert "measured" in row[device] or re.search(r"\d", row[device]), row


def test_the_messages_are_printed_somewhere():
    rows = [row for table in tables(DOCS / "troubleshooting.md") if "message" in table[0] for row in table]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row["message"])]
    assert len(quoted) > 8
    for message in quoted:
        for part in message.split("…"):
            assert part.strip() in package_strings(), f"nothing prints {part.strip()!r}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_python_and_platforms_are_said_alike_everywhere():
    project, systems = PYPROJECT["project"], PYPROJECT["tool"]["uv"]["environments"]
    least, beyond = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    minors = [int(found[1]) for c in project["classifiers"] if (found := re.search(r":: 3\.(\d+)$", c))]
    assert minors == list(range(int(least), int(beyond)))
    machines = {tuple(re.findall(r"'(\w+)'", system)) for system in systems}
    assert machines == {("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")}
    for page in (ROOT / "README.md", DOCS / "getting-started.md"):
        text = " ".join(prose(page).split())
        assert f"Python 3.{least} to 3.{int(beyond) - 1}" in text and "macOS 14 and later (arm64)" in text
        assert re.search(r"Linux \(x86_64(,| and) aarch64", text) and "WSL" in text
    assert f"(3, {least}) <= version[:2] < (3, {beyond})" in (PACKAGE / "doctor.py").read_text()
    wheels = re.findall(r"torch-[\d.]+-cp\d+-cp\d+t?-macosx_(\d+)_0_arm64", (ROOT / "uv.lock").read_text())
    assert set(wheels) == {"14"}


def test_every_page_is_in_the_navigation_and_in_the_contents():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert len(listed) == len(set(listed))
    pages = {page.name for page in DOCS.glob("*.md")}
    assert set(listed) == pages | {"measurements.md", "contributing.md"}
    contents = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))
    assert contents == pages - {"index.md"}


def test_ci_runs_the_commands_of_the_pages():
    assert "scripts/uv run pytest" in (ROOT / ".ci/run").read_text()
    workflows = "".join(path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml"))
    assert "mkdocs build --strict" in workflows


# ----------------------------------------------------------------------------------------------- scripts/uv


def test_scripts_uv_takes_the_uv_of_the_path(tmp_path):
    fake = tmp_path / "uv"
    fake.write_text('#!/bin/sh\necho "uv got: $*"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [ROOT / "scripts/uv", "run", "pytest", "-k", "a b"]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout == "uv got: run pytest -k a b\n"


def test_scripts_uv_picks_the_wheel_of_this_machine():
    fits = runpy.run_path(str(ROOT / "scripts/uv"))["fits"]
    wheels = [
        "uv-1-py3-none-macosx_11_0_arm64.whl",
        "uv-1-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "uv-1-py3-none-manylinux_2_28_aarch64.whl",
        "uv-1-py3-none-musllinux_1_1_x86_64.whl",
        "uv-1-py3-none-win_amd64.whl",
    ]
    machines = [("darwin", "arm64", ""), ("linux", "x86_64", "glibc"), ("linux", "aarch64", "glibc")]
    machines += [("linux", "x86_64", "musl")]
    assert [[i for i, w in enumerate(wheels) if fits(w, *machine)] for machine in machines] == [[0], [1], [2], [3]]


# ------------------------------------------------------------------------------------------------ really run


TO_RUN = [text for page in PAGES for _, text, run in blocks(page) if run]


@pytest.mark.slow
@pytest.mark.parametrize("text", TO_RUN)
def test_blocks_that_ask_for_it_run(text, tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_site_builds_in_strict_mode(tmp_path):
    pytest.importorskip("mkdocs", reason="uv sync --group docs")
    importlib.import_module("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) > 18
    for page in pages:  # nothing is fetched when a page is read
        assert not re.search(r'(src="|<link[^>]*href=")https?://', page.read_text()), page.name
