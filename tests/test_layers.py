"""The layers of the house, read from the imports: they run downward only.

The checker is a pure function from sources to complaints, and is itself tested on small made-up packages.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "grpo_gsm8k"
ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top. A module may import from its own layer (without a circle) and from those below.
# `name*` stands for every module of the package's top level that begins so.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "__init__",
        "interrupts",
        "errors",
        "datatypes",
        "config",
        "argv",
        "environment",
        "originals",
        "plugins",
        "r1_traces",
    ),
    ("tasks", "runs", "repro", "presets", "judge"),
    ("trainer", "engines"),
    ("evals",),
    ("preflight",),
    ("curriculum", "rollout", "workbench"),
    ("data_prep", "eval_sets", "hub_datasets", "pretokenize", "sft", "ei", "grpo", "distill", "fast_eval_vllm"),
    ("report", "pipeline", "audit", "serve", "launch", "doctor", "bench*", "objective", "study"),
    ("flags", "cli", "__main__"),
)
NETWORK = {
    "aiohttp",
    "asyncssh",
    "datasets",
    "http.client",
    "httpx",
    "huggingface_hub",
    "requests",
    "urllib.request",
    "urllib3",
}
MAY_USE_THE_NETWORK = {"data_prep", "hub_datasets", "judge", "r1_traces", "launch", "serve"}  # and a function of doctor
IN_ONE_MODULE_ONLY = ("vllm", "wandb", "datasets", "tinker", "trackio", "tensorboard")
PRIVATE = {
    f"{PACKAGE}.trainer.batch": ("trainer", "serve", "objective")
}  # a learner is given data; the tensors are its own affair
MAY_CATCH_EVERYTHING = {"plugins"}  # a user's own function can raise anything; it becomes one line
HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "datasets",
    "wandb",
    "matplotlib",
    "scipy",
    "tinker",
    "trackio",
    "tensorboard",
}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        target: dotted and absolute.
        function: in which it stands, None at module scope.
        when: "typing" under `if TYPE_CHECKING`, "script" under `if __name__ == "__main__"`, else "always".
    """

    target: str
    line: int
    function: str | None
    when: str

    def is_of(self, library: str) -> bool:
        return self.target == library or self.target.startswith(library + ".")


_GUARDS = {
    "TYPE_CHECKING": "typing",
    "typing.TYPE_CHECKING": "typing",
    "__name__ == '__main__'": "script",
}


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import in a module, those in functions and `importlib.import_module("...")` included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: list[Import] = []

    def visit(node: ast.AST, function: str | None, when: str) -> None:
        def add(target: str) -> None:
            found.append(Import(target, getattr(node, "lineno", 0), function, when))

        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                add(prefix if alias.name == "*" else f"{prefix}.{alias.name}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                add(node.args[0].value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = getattr(node, "name", "<lambda>")
        guarded = _GUARDS.get(ast.unparse(node.test)) if isinstance(node, ast.If) else None
        body = node.body if isinstance(node, ast.If) else []
        for child in ast.iter_child_nodes(node):
            visit(child, function, guarded if guarded and child in body else when)

    visit(ast.parse(source), None, "always")
    return found


def room_of(module: str) -> str:
    """`grpo_gsm8k.trainer.batch` is in the room `trainer`, `grpo_gsm8k.sft` in `sft`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(room: str) -> int | None:
    for number, rooms in enumerate(LAYERS):
        if any(room == r or (r.endswith("*") and room.startswith(r[:-1])) for r in rooms):
            return number
    return None


def complaints(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with a package, given as {path below its folder: source}."""
    modules: dict[str, str] = {}
    packages: set[str] = set()
    for path, source in sources.items():
        parts = [PACKAGE, *path.removesuffix(".py").split("/")]
        if parts[-1] == "__init__":
            parts.pop()
            packages.add(".".join(parts))
        modules[".".join(parts)] = source
    imports = {
        name: [i for i in imports_of(source, name, name in packages) if i.when != "typing"]
        for name, source in modules.items()
    }

    def inner(imported: Import) -> str | None:
        """The module of this package that an import reaches: `errors` for `grpo_gsm8k.errors.DataError`.

        A stage that is started as a script may go through the command line: nobody imports that line.
        """
        target = imported.target
        if not imported.is_of(PACKAGE) or imported.when == "script":
            return None
        while target not in modules and target.count(".") > 1:
            target = target.rpartition(".")[0]
        return target if target in modules or target.count(".") == 1 else PACKAGE

    found: list[str] = []
    for name in modules:
        short, room = name.removeprefix(PACKAGE + "."), room_of(name)
        own_layer = layer_of(room)
        if own_layer is None:
            found.append(f"{short}: in no layer; give it a place in LAYERS")
            continue
        parts = name.replace(".tasks.math", ".tasks").split(".")[1:]  # the data set's own name, and users import it so
        bad_names = [part for part in parts if part in sys.stdlib_module_names]
        found += [f"{short}: named like the standard library's {part}" for part in bad_names]
        for i in imports[name]:
            where = f"{short}:{i.line}"
            reached = inner(i)
            below = layer_of(room_of(reached)) if reached else None
            if below is not None and below > own_layer:
                found.append(f"{where}: imports upward, {reached}")
            if reached in PRIVATE and room not in PRIVATE[reached]:
                found.append(f"{where}: {reached} is private to {' and '.join(f'{r}/' for r in PRIVATE[reached])}")
            if room == "tasks" and i.is_of("torch"):
                found.append(f"{where}: torch in {room}/")
            if room == "r1_traces" and i.target.split(".")[0] not in {*sys.stdlib_module_names, "aiohttp"}:
                found.append(f"{where}: r1_traces imports {i.target}; the stdlib and aiohttp only")
            library = next((n for n in sorted(NETWORK) if i.is_of(n)), None)
            if library and room not in MAY_USE_THE_NETWORK and not (room == "doctor" and i.function):
                found.append(f"{where}: {library} touches the network")
        if room not in MAY_CATCH_EVERYTHING:
            found += [f"{short}:{line}: {what}" for line, what in swallowed(modules[name])]

    for library in IN_ONE_MODULE_ONLY:
        users = sorted(name for name in modules if any(i.is_of(library) for i in imports[name]))
        if len(users) > 1:
            found.append(f"{library} is imported in more than one module: {', '.join(users)}")
    network_functions = {
        i.function for i in imports.get(f"{PACKAGE}.doctor", []) if any(i.is_of(library) for library in NETWORK)
    }
    if len(network_functions) > 1:
        found.append("doctor: more than one function touches the network")

    found += circles({name: {r for i in imports[name] if (r := inner(i)) and r != name} for name in modules})
    found += heavy_at_the_door(imports, inner_of=inner)
    return found


def heavy_at_the_door(imports: Mapping[str, list[Import]], inner_of: Callable[[Import], str | None]) -> list[str]:
    """Heavy libraries that `import grpo_gsm8k.cli` would load; `--help` must answer at once."""
    seen: set[str] = set()
    pending = [f"{PACKAGE}.cli"]
    found = []
    while pending:
        name = pending.pop()
        if name in seen or name not in imports:
            continue
        seen.add(name)
        pending += [name.rpartition(".")[0]]  # importing a module runs its package's __init__
        for i in imports[name]:
            if i.function is not None or i.when == "script":
                continue
            if library := next((n for n in sorted(HEAVY) if i.is_of(n)), None):
                found.append(f"{name.removeprefix(PACKAGE + '.')}:{i.line}: cli loads {library} at its start")
            if reached := inner_of(i):
                pending.append(reached)
    return found


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, lazily or not. The package's own __init__ does not count."""
    found: list[str] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append("circle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in done and name in graph:
            for target in sorted(graph[name] - {PACKAGE}):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def swallowed(source: str) -> Iterator[tuple[int, str]]:
    """Handlers that catch everything. `except BaseException` may clean up if it ends with `raise`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = _names(node.type)
            last = node.body[-1]
            cleans_up = caught == {"BaseException"} and isinstance(last, ast.Raise) and last.exc is None
            if node.type is None or (caught & {"Exception", "BaseException"} and not cleans_up):
                yield node.lineno, "catches everything; name what you can repair"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("suppress")
            and any(_names(argument) & {"Exception", "BaseException"} for argument in node.args)
        ):
            yield node.lineno, "suppresses everything; name what you can repair"


def _names(node: ast.expr | None) -> set[str]:
    if isinstance(node, ast.Tuple):
        return set().union(*map(_names, node.elts))
    return {ast.unparse(node).removeprefix("builtins.")} if node else set()


# ---- the house


def read_package() -> dict[str, str]:
    folder = ROOT / PACKAGE
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py"))}


def test_the_house_keeps_its_layers() -> None:
    sources = read_package()
    assert "errors.py" in sources
    assert complaints(sources) == []


def test_the_scripts_catch_only_what_they_name() -> None:
    for path in (ROOT / "scripts").rglob("*.py"):
        assert list(swallowed(path.read_text())) == [], path


@pytest.mark.skipif(not (ROOT / PACKAGE / "cli.py").is_file(), reason="no cli yet")
def test_the_command_line_really_starts_light() -> None:
    code = f"import sys, {PACKAGE}.cli; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- the checker, on packages that are made up

CLEAN = {
    "__init__.py": "__version__ = '0'",
    "errors.py": "class GrpoError(Exception): ...",
    "datatypes.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo_gsm8k.trainer.batch import B",
    "tasks/__init__.py": "",
    "tasks/grading.py": "import re\nfrom grpo_gsm8k.errors import GrpoError",
    "runs/files.py": "def f():\n    try: g()\n    except BaseException:\n        h()\n        raise",
    "repro.py": "from grpo_gsm8k.runs.files import f\ndef g():\n    import torch",
    "trainer/__init__.py": "",
    "trainer/batch.py": "import torch\nfrom grpo_gsm8k import errors, datatypes",
    "engines/vllm_engine.py": "def f():\n    import vllm",
    "r1_traces.py": "import asyncio, urllib.request, aiohttp",
    "sft.py": "import torch\nfrom .trainer.losses import L\nfrom grpo_gsm8k.datatypes import Datum",
    "ei.py": "from grpo_gsm8k import sft\nif __name__ == '__main__':\n    from grpo_gsm8k.cli import run",
    "doctor.py": "from urllib.parse import urlsplit\ndef reach():\n    import urllib.request, urllib.error",
    "cli.py": "import typer\nfrom grpo_gsm8k import doctor, errors\ndef sft():\n    from grpo_gsm8k import sft",
}


def test_a_clean_package_has_no_complaint() -> None:
    assert complaints(CLEAN) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("errors.py", "from grpo_gsm8k.runs.files import f", "errors:1: imports upward, grpo_gsm8k.runs.files"),
        ("tasks/grading.py", "def f():\n    from grpo_gsm8k import trainer", "imports upward, grpo_gsm8k.trainer"),
        ("tasks/grading.py", "from ..trainer import batch", "imports upward, grpo_gsm8k.trainer.batch"),
        ("tasks/__init__.py", "from ..trainer import batch", "tasks:1: imports upward, grpo_gsm8k.trainer.batch"),
        ("trainer/batch.py", "import grpo_gsm8k.sft", "trainer.batch:1: imports upward, grpo_gsm8k.sft"),
        (
            "trainer/batch.py",
            "import importlib\nimportlib.import_module('grpo_gsm8k.sft')",
            "trainer.batch:2: imports up",
        ),
        ("sft.py", "from grpo_gsm8k.pipeline import run", "sft:1: imports upward, grpo_gsm8k.pipeline"),
        ("datatypes.py", "if 1:\n    from grpo_gsm8k.trainer.batch import B", "datatypes:2: imports upward"),
        (
            "datatypes.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from grpo_gsm8k.trainer.batch import B",
            "datatypes:4: imports upward",
        ),
        ("sft.py", "def main():\n    from grpo_gsm8k.cli import run", "sft:2: imports upward, grpo_gsm8k.cli"),
        ("r1_traces.py", "if __name__ == '__main__':\n    from grpo_gsm8k.cli import m", "r1_traces imports grpo"),
        ("sft.py", "from grpo_gsm8k.ei import f", "circle: grpo_gsm8k.sft -> grpo_gsm8k.ei -> grpo_gsm8k.sft"),
        ("attic.py", "", "attic: in no layer"),
        ("attic/old.py", "", "attic.old: in no layer"),
        ("tasks/types.py", "", "tasks.types: named like the standard library's types"),
        ("trainer/queue/__init__.py", "", "trainer.queue: named like the standard library's queue"),
        (
            "sft.py",
            "def f():\n    from .trainer.batch import B",
            "trainer.batch is private to trainer/",
        ),
        ("tasks/grading.py", "def f():\n    import torch.nn", "tasks.grading:2: torch in tasks/"),
        ("evals/worker.py", "def f():\n    from vllm import LLM", "vllm is imported in more than one module"),
        ("sft.py", "import aiohttp", "sft:1: aiohttp touches the network"),
        ("sft.py", "def f():\n    from urllib import request", "sft:2: urllib.request touches the network"),
        ("sft.py", "def f():\n    import huggingface_hub as h", "sft:2: huggingface_hub touches the network"),
        ("doctor.py", "import urllib.request", "doctor:1: urllib.request touches the network"),
        (
            "doctor.py",
            "def f():\n    import requests\ndef g():\n    import aiohttp",
            "doctor: more than one function touches the network",
        ),
        ("doctor.py", "import torch", "doctor:1: cli loads torch at its start"),
        ("doctor.py", "from grpo_gsm8k.trainer.batch import B", "trainer.batch:1: cli loads torch at its start"),
        ("errors.py", "import scipy.stats", "errors:1: cli loads scipy at its start"),
        ("__init__.py", "import matplotlib", "grpo_gsm8k:1: cli loads matplotlib at its start"),
        ("r1_traces.py", "from grpo_gsm8k.errors import DataError", "r1_traces imports grpo_gsm8k.errors.DataError"),
        ("r1_traces.py", "def f():\n    import tqdm", "r1_traces imports tqdm"),
        ("sft.py", "try: f()\nexcept Exception: pass", "sft:2: catches everything"),
        ("sft.py", "try: f()\nexcept: raise", "sft:2: catches everything"),
        ("sft.py", "try: f()\nexcept (OSError, Exception) as e: raise", "sft:2: catches everything"),
        ("sft.py", "try: f()\nexcept BaseException: g()", "sft:2: catches everything"),
        ("sft.py", "try: f()\nexcept BaseException as e: raise X from e", "sft:2: catches everything"),
        ("sft.py", "with contextlib.suppress(Exception): f()", "sft:1: suppresses everything"),
    ],
)
def test_the_checker_finds(path: str, source: str, complaint: str) -> None:
    found = complaints({**CLEAN, path: source})
    assert any(complaint in one for one in found), found


def test_two_wandb_modules_are_one_too_many() -> None:
    runs = {"runs/wandb_sink.py": "import wandb", "evals/worker.py": "def f():\n    import wandb.sdk"}
    assert complaints({**CLEAN, "runs/wandb_sink.py": "import wandb"}) == []
    assert len(complaints({**CLEAN, **runs})) == 1
