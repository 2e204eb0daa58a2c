"""Stage 1: pinned GSM8K → train / val / test, and a manifest that says what they are made of.

    python -m grpo_gsm8k.data_prep                                            the hub's pinned commit, artifacts/gsm8k
    python -m grpo_gsm8k.data_prep --out-dir artifacts/data                   the same, elsewhere
    python -m grpo_gsm8k.data_prep --out-dir artifacts/data --source FOLDER   its train.jsonl and test.jsonl

`val` is reserved from train: `random.Random(seed)` shuffles the indices of train, the first `eval_n` of them
are the validation problems, and both parts keep the order of the source. So a smaller `eval_n` reserves a
subset of a larger one, and a problem's id, its index in the source, depends on neither. The real data gives
6,961 / 512 / 1,319 problems. The shuffle is pure Python: the same on every platform.

`manifest.json` is written last. It holds no time and no path, so the same arguments give the same bytes
anywhere. Running again verifies the files against it and changes nothing; other arguments over an existing
folder are refused. A run that was killed left no manifest, and the next one writes the files anew.

`--snapshot-dir` keeps the source files as they were fetched, with their hashes in `snapshot.json`. Later
`--source SNAPSHOT_DIR` gives the same files and the same manifest without the hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k import environment
from grpo_gsm8k.argv import Parser
from grpo_gsm8k.config import OTHER_DATA
from grpo_gsm8k.datatypes import Example
from grpo_gsm8k.errors import ConfigError, DataError, DiskError, GrpoError, UserError
from grpo_gsm8k.runs.files import (
    atomic_path,
    read_json,
    read_jsonl,
    real_path,
    sha256_file,
    write_json,
)
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import Task, load_examples
from grpo_gsm8k.tasks.dataset import Manifest, read_manifest, refuse_difference, reserve, verify, write_splits
from grpo_gsm8k.tasks.gsm8k.problems import KEYS, example_from_row, row_of

REPO = "openai/gsm8k"
PINNED = "740312add88f781978c0658806c59bc2815b9866"
PINNED_SHA256 = {
    "train": "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d",
    "test": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59",
}
EVAL_N = 512
SEED = 31415

REMOTE = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}
_NOT_THE_HUB = (
    "use --source DIR with a folder that has train.jsonl and test.jsonl, set HF_ENDPOINT to a mirror, "
    "or let --cache-dir name a hub cache that holds the data"
)


@dataclass(frozen=True)
class DataSummary:
    """What `prepare` left behind: problems in each split, the manifest, and whether it was there before."""

    train: int
    val: int
    test: int
    manifest: Path
    verified: bool


def prepare(
    out_dir: Path,
    source: str | Path = "hub",
    eval_n: int = EVAL_N,
    seed: int = SEED,
    revision: str = PINNED,
    cache_dir: Path | None = None,
    snapshot_dir: Path | None = None,
) -> DataSummary:
    """Make the three splits in `out_dir`, or verify those that are there.

    Args:
        out_dir: gets `train.jsonl`, `val.jsonl`, `test.jsonl` and `manifest.json`.
        source: "hub", or a folder with `train.jsonl` and `test.jsonl`, or a snapshot.
        eval_n: problems reserved from train for validation.
        seed: decides which.
        revision: commit, branch or tag of the hub's dataset. A folder's revision is the hash of its files.
        cache_dir: the hub's cache, if not the usual one.
        snapshot_dir: where to keep the source files.
    """
    out_dir = Path(out_dir)
    if eval_n < 1:
        raise ConfigError(f"eval_n must be at least 1, not {eval_n}")
    kept_apart = {"--source": None if source == "hub" else source, "--snapshot_dir": snapshot_dir}
    for flag, folder in kept_apart.items():
        if folder is not None and real_path(folder) == real_path(out_dir):
            raise ConfigError(f"--out_dir and {flag} are both {out_dir}; choose another --out_dir")

    origin = _hub(revision, cache_dir) if source == "hub" else _folder(Path(source))
    provenance = {"source": origin.name, "revision": origin.revision, "seed": seed, "eval_n": eval_n}
    made_before = (out_dir / "manifest.json").exists()
    if made_before:
        refuse_difference(read_manifest(out_dir), provenance)
    if snapshot_dir is not None:
        _write_snapshot(Path(snapshot_dir), origin)

    damage: DataError | None = None
    if made_before:
        try:
            return _summary(verify(out_dir, load_task("gsm8k")), verified=True)
        except DataError as error:
            damage = error  # the source may tell which row it is
    try:
        splits = _split(origin, eval_n, seed)
    except UserError:
        if damage is not None:
            raise damage from None
        raise
    rows = {split: [{key: row_of(example)[key] for key in KEYS} for example in splits[split]] for split in splits}
    write_splits(out_dir, rows, provenance, load_task("gsm8k"))
    return _summary(read_manifest(out_dir), verified=False)


# --- where the problems come from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """The source files of train and test; `fetch` gives their paths, and only it may download."""

    name: str
    revision: str
    fetch: Callable[[], dict[str, Path]]


def _hub(revision: str, cache_dir: Path | None) -> _Origin:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        revision = resolve(REPO, revision)
    return _Origin(REPO, revision, lambda: _download(revision, cache_dir))


def _download(commit: str, cache_dir: Path | None) -> dict[str, Path]:
    files = download(REPO, commit, REMOTE, cache_dir)
    if commit == PINNED:
        for split, path in files.items():
            if (found := sha256_file(path)) != PINNED_SHA256[split]:
                expected = PINNED_SHA256[split]
                what = f"sha256 is {found}, not {expected} as in {REPO} at {commit}; delete it and run again"
                raise DataError(path, what)
    return files


def resolve(repo: str, revision: str) -> str:
    """The commit that a branch, a tag or a short hash of a data set stands for now; fails at once without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        sha = HfApi().dataset_info(repo, revision=revision).sha
    except RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision!r} on the hub") from None
    except _hub_errors() as error:
        raise _unreachable(repo, revision, error) from error
    assert sha is not None, "the hub answered without a commit"
    return sha


def download(repo: str, commit: str, names: Mapping[str, str], cache_dir: Path | None) -> dict[str, Path]:
    """The files of a data set at a commit, key → file there, from the hub's cache if all of them are in it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(name: str, local_files_only: bool) -> Path:
        return Path(
            hf_hub_download(
                repo,
                name,
                repo_type="dataset",
                revision=commit,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    try:
        return {key: get(name, local_files_only=True) for key, name in names.items()}
    except LocalEntryNotFoundError:
        resolve(repo, commit)  # a download would retry for half a minute before it says that there is no network
    try:
        return {key: get(name, local_files_only=False) for key, name in names.items()}
    except _hub_errors() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"the hub's cache cannot be written: {error.strerror}") from error
        raise _unreachable(repo, commit, error) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a call to the hub raises: its own errors, `OSError`, and those of its HTTP client."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return EntryNotFoundError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def _unreachable(repo: str, revision: str, error: BaseException) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"{repo} at {revision} cannot be fetched from the hub: {reason}; {_NOT_THE_HUB}")


def _folder(folder: Path) -> _Origin:
    if not folder.is_dir():
        raise DataError(folder, "is no folder; --source is `hub` or a folder with train.jsonl and test.jsonl")
    if (folder / "snapshot.json").exists():
        return _snapshot(folder)
    if (folder / "manifest.json").exists() and (folder / "val.jsonl").exists():
        raise DataError(folder, "is split already, so it cannot be a source; use it as it is")
    files = {split: folder / f"{split}.jsonl" for split in REMOTE}
    for path in files.values():
        if not path.is_file():
            raise DataError(path, "does not exist; a source folder has train.jsonl and test.jsonl")
    # The same as `sha256sum train.jsonl test.jsonl | sha256sum`.
    listing = "".join(f"{sha256_file(path)}  {path.name}\n" for path in files.values())
    return _Origin("folder", f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", lambda: files)


def _snapshot(folder: Path) -> _Origin:
    """A snapshot stands for what it was taken from, so its splits and manifest are the same to the byte."""
    record = read_json(folder / "snapshot.json")
    files: dict[str, Path] = {}
    try:
        for name, sha256 in record["files"].items():
            files[Path(name).stem] = folder / Path(name).name
            if sha256_file(folder / Path(name).name) != sha256:
                raise DataError(folder / name, "was changed after the snapshot was taken")
        origin = _Origin(str(record["source"]), str(record["revision"]), lambda: files)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(folder / "snapshot.json", f"is no snapshot of this command: {error!r}") from None
    except FileNotFoundError as error:
        raise DataError(error.filename, "is missing, though snapshot.json lists it") from None
    if set(files) != set(REMOTE):
        raise DataError(folder / "snapshot.json", "must list one train and one test file")
    return origin


def _write_snapshot(folder: Path, origin: _Origin) -> None:
    hashes: dict[str, str] = {}
    for split, path in origin.fetch().items():
        copy = folder / f"{split}{path.suffix}"
        hashes[copy.name] = sha256_file(path)
        if not copy.exists():
            with atomic_path(copy) as temporary:
                shutil.copyfile(path, temporary)
        elif sha256_file(copy) != hashes[copy.name]:
            raise DataError(copy, "is there already and differs; choose another --snapshot_dir")
    record = {"source": origin.name, "revision": origin.revision, "files": hashes}
    if not (folder / "snapshot.json").exists():
        write_json(folder / "snapshot.json", record)
    elif read_json(folder / "snapshot.json") != record:
        raise DataError(folder / "snapshot.json", "is of another source; choose another --snapshot_dir")


def prepare_task(
    task: Task, out_dir: Path, source: str = "", sizes: Mapping[str, int] | None = None, seed: int = SEED
) -> DataSummary:
    """The splits of another task than GSM8K: made by seed, or from a folder with its train.jsonl and test.jsonl.

    Args:
        source: the folder; "" for a task that makes its own data.
        sizes: rows of each split; of a folder's train.jsonl, `val` rows are reserved.

    Raises:
        ConfigError: the task makes no data of its own.
    """
    sizes = sizes or {"train": 4096, "val": EVAL_N, "test": EVAL_N}
    if not source:
        if task.generate(out_dir, seed, sizes) is None:
            raise ConfigError(f"task {task.spec!r} makes no data of its own: pass --source, a folder with its files")
        return _summary(verify(out_dir, task), verified=False)
    files = {split: Path(source) / f"{split}.jsonl" for split in ("train", "test")}
    rows = {split: _rows_with_ids(task, path) for split, path in files.items()}
    if sizes["val"] >= len(rows["train"]):
        raise ConfigError(f"eval_n {sizes['val']} leaves nothing to train on: the source has {len(rows['train'])}")
    train, val = reserve(rows["train"], sizes["val"], seed)
    splits = {"train": train, "val": val, "test": rows["test"]}
    hashes = {split: sha256_file(path) for split, path in files.items()}
    write_splits(out_dir, splits, {"task": task.spec, "source": hashes, "seed": seed, "eval_n": sizes["val"]})
    return _summary(read_manifest(out_dir), verified=False)


def _rows_with_ids(task: Task, path: Path) -> list[dict[str, Any]]:
    """The rows of a file that the task reads, each with an id that tells the splits apart."""
    examples = load_examples(task, path)
    return [{**row, "id": f"{path.stem}-{e.id}"} for e, (_, row) in zip(examples, read_jsonl(path), strict=True)]


def _split(origin: _Origin, eval_n: int, seed: int) -> dict[str, list[Example]]:
    files = origin.fetch()
    train, test = (_source_problems(files[split], split) for split in ("train", "test"))
    if eval_n >= len(train):
        raise ConfigError(
            f"eval_n {eval_n} leaves no problem to train on: the source has {len(train)}; choose an eval_n below that"
        )
    train, val = reserve(train, eval_n, seed)
    return {"train": train, "val": val, "test": test}


def _source_problems(path: Path, split: str) -> list[Example]:
    """The rows of a source file; whatever ids they have, the index is the id."""
    problems = []
    rows = parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)
    for index, (line, row) in enumerate(rows):
        try:
            problem = example_from_row({key: row[key] for key in row if key != "id"})
        except ValueError as fault:
            raise DataError(path, str(fault), line) from None
        problems.append(dataclasses.replace(problem, id=f"gsm8k-{split}-{index:05d}"))
    return problems


def parquet_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file with 1-based numbers. Raises `DataError` for any other file."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(path, f"is no parquet file: {str(error).splitlines()[0]}") from None
    return enumerate(rows, 1)


def _summary(manifest: Manifest, verified: bool) -> DataSummary:
    return DataSummary(**manifest.counts, manifest=manifest.path, verified=verified)


# --- the command --------------------------------------------------------------------------------------------


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="python -m grpo_gsm8k.data_prep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out-dir", "--out_dir", type=Path, default=Path(OTHER_DATA), help=f"default: {OTHER_DATA}")
    parser.add_argument("--source", default="hub", metavar="hub|DIR", help="default: hub")
    parser.add_argument("--eval-n", "--eval_n", type=int, default=EVAL_N, metavar="N", help="default: 512")
    parser.add_argument("--seed", type=int, default=SEED, help="default: 31415")
    parser.add_argument("--revision", default=PINNED, help=f"default: {PINNED}")
    parser.add_argument("--cache-dir", "--cache_dir", type=Path, metavar="DIR")
    parser.add_argument("--snapshot-dir", "--snapshot_dir", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: Sequence[str] | None = None, **settings: Any) -> int:
    """`python -m grpo_gsm8k.data_prep`; returns the exit code.

    Args:
        settings: of `prepare`, for a script: `main(out_dir="artifacts/gsm8k", eval_n=800)`. They stand in for `argv`.
    """
    options = vars(flags().parse_args([] if settings else argv)) | settings
    as_json = options.pop("json")
    try:
        for wrong in environment.load():
            print(wrong, file=sys.stderr)
        summary = prepare(**options)
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    counts = {"train": summary.train, "val": summary.val, "test": summary.test}
    verb = "verified" if summary.verified else "wrote"
    listing = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    print(f"{verb} {summary.manifest.parent}: {listing}", file=sys.stderr)
    print(json.dumps({**counts, "manifest": str(summary.manifest)}) if as_json else summary.manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
