"""What a run's model and data are, in words, and its own texts without the names of people and machines."""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.report.read import Run, is_inside, read_text
from grpo_gsm8k.report.words import label

_QUOTED = re.compile(r"""(["'])/(?=[^"'\n]*/)[^"'\n]*\1""")  # an absolute path that may hold spaces
_PATH = re.compile(r"(?<![\w./~…])(?:/[\w.+@%-]+){2,}/?")
_HOME = re.compile(r"(?<![\w/])~[A-Za-z_][\w.-]*(?=/)")
_ADDRESS = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*")
_CHECKPOINT = re.compile(r"(?:(?P<run>[^/]+)/)?(?P<stage>sft|ei|grpo|distill)?/?checkpoints/step_0*(?P<step>\d+)/?$")
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{7,40})/?$")
_MADE = {  # a manifest's `source` for what this package makes by itself
    "toy": "made-up word problems",
    "toy chat": "made-up conversations",
    "generated": "generated examples",
}


def public(text: str, run: Run) -> str:
    """A text of the run's provenance without what names people and machines: the page may be published.

    Paths into the run directory begin with its name. Of any other absolute path the last part stays; addresses and
    this machine's name go.
    """
    text = text.replace("file://", "")
    for home in _homes(run):
        text = re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.+@%-])", lambda _: run.path.name, text)
    text = _QUOTED.sub(lambda m: f"{m[1]}{_last_part(m[0][1:-1])}{m[1]}", text)
    text = _HOME.sub("~", _ADDRESS.sub("[address]", _PATH.sub(lambda m: _last_part(m[0]), text)))
    host = platform.node()
    return re.sub(rf"\b{re.escape(host)}\b", "[host]", text) if len(host) > 3 and host != "localhost" else text


def _last_part(path: str) -> str:
    parts = path.strip("/").split("/")
    return f"…/{parts[-1]}" if len(parts) > 2 else "…"  # /home/NAME is a name


def _homes(run: Run) -> list[str]:
    """The absolute paths that the run directory has and had, the longest first."""
    recorded = [str(run.path), str(run.summary.get("run_dir", ""))]
    for kind, folder in run.folders.items():
        out = str(run.config.get(f"{kind}.out_dir", "")).rstrip("/")
        recorded.append(out if folder == run.path else out.removesuffix(f"/{kind}"))
    found = {path.rstrip("/") for path in recorded if path.startswith("/") and path.count("/") > 1}
    return sorted(found, key=lambda path: (-len(path), path))


def _is_own(run: Run, value: str, folder: str) -> bool:
    """Whether a recorded path is this folder of the run directory, which the pipeline makes."""
    return value in {f"{home}/{folder}" for home in [*_homes(run), str(run.summary.get("run_dir", ""))]}


def home_relative(value: object, run: Run) -> object:
    """A path into the run directory as its part below it; anything else as it is."""
    homes = [*_homes(run), str(run.summary.get("run_dir", ""))]
    if isinstance(value, str) and (home := next((h for h in homes if h and value.startswith(f"{h}/")), None)):
        return value.removeprefix(f"{home}/")
    return value


def data_hash(run: Run, kind: str) -> str:
    """The sha256 of the file that a training run learned from; "" where none is recorded."""
    entry = _json(run.folders[kind] / "data.json", run).get("train")
    return str(entry.get("sha256", "")) if isinstance(entry, dict) else ""


def command(text: str, run: Run) -> str:
    """A command as one would type it: the program by its name, paths without the machine's folders."""
    try:
        words = shlex.split(text)
    except ValueError:  # an open quote
        return public(text, run)
    if len(words) > 1 and Path(words[0]).name.startswith("python") and words[1].endswith("/grpo-gsm8k"):
        del words[0]  # the console script, as the interpreter was started with it
    if words and (module := re.search(r"(?:^|/)grpo_gsm8k/([\w/]+)\.py$", words[0])):
        name = module[1].removesuffix("/__init__").removesuffix("/__main__").replace("/", ".")
        words[:1] = ["python", "-m", f"grpo_gsm8k.{name}"]
    elif words:
        words[0] = Path(words[0]).name
    return public(" ".join(map(shlex.quote, words)), run)


def model_name(run: Run) -> str:
    """What the run started from: the hub's name, a checkpoint of which run, or the model that it made, and its size."""
    value = str(run.summary.get("model_id") or run.first_setting("model_id"))
    revision, made = run.first_setting("revision"), _is_own(run, value, "model")
    folders = [run.path / "model"] if made else [p for f in run.folders.values() for p in f.glob("checkpoints/step_*")]
    size = next((text for folder in sorted(folders) if (text := _architecture(folder, run))), "")
    if made:
        return f"made for this run with random weights{': ' if size else ''}{size}"
    if match := _SNAPSHOT.search(value):
        name = f"{match['owner']}/{match['name']} at {match['commit'][:8]}"
    elif match := _CHECKPOINT.search(value):
        stage = f" of {label(match['stage'])}" if match["stage"] else ""
        name = f"checkpoint of step {int(match['step']):,}{stage}{' in ' if match['run'] else ''}{match['run'] or ''}"
    else:
        name = public(value, run) + (f" at {revision[:8]}" if revision else "")
    return f"{name} ({size})" if size and name else name


def _architecture(folder: Path, run: Run) -> str:
    """`qwen2, 2 layers of width 128, 0.6 M parameters`; "" where the folder holds no model."""
    try:
        config = json.loads(read_text(folder / "config.json", run.path) or "{}")
    except (ValueError, RecursionError):
        return ""
    if not isinstance(config, dict) or "model_type" not in config:
        return ""
    parts = [str(config["model_type"])[:40]]
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    if isinstance(layers, int) and isinstance(width, int):
        parts.append(f"{layers:,} layers of width {width:,}")
    if count := _parameters(folder, run):
        large = [f"{count / size:.3g} {unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= size]
        parts.append(f"{(large or [str(count)])[0]} parameters")
    return ", ".join(parts)


def _parameters(folder: Path, run: Run) -> int:
    """How many numbers the weight files hold, by their headers; 0 where one cannot be read."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        if not is_inside(path, run.path):
            return 0
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  a file, not a dict
                    size = 1
                    for side in file.get_slice(key).get_shape():
                        size *= side
                    total += size
        except (SafetensorError, OSError):
            return 0
    return total


def data_name(run: Run) -> str:
    """What the run learned from: the data set and its revision where they are recorded, and how many rows."""
    value, entry = str(run.summary.get("data") or run.first_setting("data")), _recorded(run)
    if isinstance(origin := entry.get("from"), dict) and "dataset" in origin:
        at = f" at {str(origin['revision'])[:8]}" if origin.get("revision") else ""
        return public(f"{origin['dataset']}, split {origin.get('split', '?')}{at}", run)
    manifest = _json(run.path / "data/manifest.json", run) if _is_own(run, value, "data") else entry.get("manifest")
    if not isinstance(manifest, dict) or "source" not in manifest:
        return public(value, run)
    source = manifest["source"]
    name = _MADE.get(source, public(source, run)) if isinstance(source, str) else Path(value).name
    name += f" at {str(manifest['revision'])[:8]}" if manifest.get("revision") else ""
    name += f", seed {manifest['seed']}" if "seed" in manifest else ""
    counts = manifest.get("counts")
    if isinstance(counts, dict) and all(isinstance(n, int) for n in counts.values()):
        name += f": {', '.join(f'{n:,} {split}' for split, n in counts.items())}"
    return name


def _recorded(run: Run) -> Mapping[str, Any]:
    """What the first training run wrote of the file that it trained on."""
    for folder in run.folders.values():
        entry = _json(folder / "data.json", run).get("train")
        if isinstance(entry, dict):
            return entry
    return {}


def _json(path: Path, run: Run) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, run.path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
