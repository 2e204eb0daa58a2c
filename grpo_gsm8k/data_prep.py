"""Stage 1: pinned GSM8K → train / val / test, and a manifest that says what they are made of.

    python -m grpo_gsm8k.data_prep --out-dir artifacts/data                   from the hub, a pinned commit
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
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k.datatypes import Problem
from grpo_gsm8k.errors import ConfigError, DataError, DiskError, GrpoError, UserError
from grpo_gsm8k.gsm8k.problems import SPLITS, load_problems, problem_from_row
from grpo_gsm8k.runs.files import (
    atomic_path,
    json_line,
    read_json,
    read_jsonl,
    read_lines,
    real_path,
    sha256_file,
    write_json,
    write_jsonl,
)

REPO = "openai/gsm8k"
PINNED = "740312add88f781978c0658806c59bc2815b9866"
PINNED_SHA256 = {
    "train": "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d",
    "test": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59",
}
EVAL_N = 512
SEED = 31415
FORMAT = 1
KEYS = ("id", "question", "answer", "gold")  # of a row, in this order

_REMOTE = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}
_MEND = "restore it, or delete the folder and run again"
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


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        path: the file.
        provenance: what the splits were made of, for GSM8K `source`, `revision`, `seed` and `eval_n`.
        counts: problems in each split.
        files: sha256 of each split's file.
        content: sha256 of each split's ids, questions and answers in order, however the file is formatted.
    """

    path: Path
    provenance: dict[str, Any]
    counts: dict[str, int]
    files: dict[str, str]
    content: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        parts = {"counts": self.counts, "files": self.files, "content": self.content}
        return {"format": FORMAT, **self.provenance, **parts}


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
        _refuse_difference(_read_manifest(out_dir), provenance)
    if snapshot_dir is not None:
        _write_snapshot(Path(snapshot_dir), origin)

    damage: DataError | None = None
    if made_before:
        try:
            return _summary(verify(out_dir), verified=True)
        except DataError as error:
            damage = error  # the source may tell which row it is
    try:
        splits = _split(origin, eval_n, seed)
    except UserError:
        if damage is not None:
            raise damage from None
        raise
    write_splits(out_dir, splits, provenance)
    return _summary(_read_manifest(out_dir), verified=False)


def write_splits(out_dir: Path, splits: Mapping[str, Sequence[Problem]], provenance: Mapping[str, Any]) -> Path:
    """Write `train.jsonl`, `val.jsonl`, `test.jsonl` and, last, `manifest.json`; or verify them, row by row.

    Args:
        out_dir: made if missing.
        splits: exactly train, val and test, none empty, no id twice.
        provenance: what the problems were made of (plain JSON values); goes into the manifest.

    Returns:
        The path of the manifest.

    Raises:
        DataError: the folder holds other data, or a row of it was changed: names the file and the line.
    """
    out_dir = Path(out_dir)
    assert set(splits) == set(SPLITS) and all(splits.values()), "train, val and test are needed, none empty"
    ids = [problem.id for problems in splits.values() for problem in problems]
    assert len(set(ids)) == len(ids), "a problem's id occurs twice"
    rows = {split: [{key: getattr(problem, key) for key in KEYS} for problem in splits[split]] for split in SPLITS}
    manifest = Manifest(
        path=out_dir / "manifest.json",
        provenance=json.loads(json.dumps(dict(provenance))),
        counts={split: len(rows[split]) for split in SPLITS},
        files={f"{split}.jsonl": _sha256(map(json_line, rows[split])) for split in SPLITS},
        content={split: content_sha256(splits[split]) for split in SPLITS},
    )
    if manifest.path.exists():
        existing = _read_manifest(out_dir)
        _refuse_difference(existing, manifest.provenance)
        for split in SPLITS:
            _compare(out_dir / f"{split}.jsonl", rows[split])
        if existing != manifest:
            raise DataError(manifest.path, f"was changed after it was written; {_MEND}")
        return manifest.path
    for split in SPLITS:
        _refuse_foreign(out_dir / f"{split}.jsonl")
    for split in SPLITS:
        write_jsonl(out_dir / f"{split}.jsonl", rows[split])
    write_json(manifest.path, manifest.as_json())
    return manifest.path


def verify(out_dir: Path) -> Manifest:
    """Read every split and recompute every hash of the manifest.

    Raises:
        DataError: a file is missing, broken, or not what the manifest says.
    """
    manifest = _read_manifest(Path(out_dir))
    line_of: dict[str, str] = {}
    for split in SPLITS:
        path = Path(out_dir) / f"{split}.jsonl"
        if not path.exists():
            raise DataError(path, f"is missing, though the manifest lists it; {_MEND}")
        problems = load_problems(path)
        for line, problem in enumerate(problems, 1):
            first = line_of.setdefault(problem.id, f"{path.name}:{line}")
            if first != f"{path.name}:{line}":
                raise DataError(path, f"duplicate id {problem.id!r}: it is in {first} already", line)
        facts = (len(problems), sha256_file(path), content_sha256(problems))
        if facts != (manifest.counts[split], manifest.files[path.name], manifest.content[split]):
            raise DataError(path, f"is not what the manifest says: one of them was changed; {_MEND}")
    return manifest


def content_sha256(problems: Iterable[Problem]) -> str:
    """Hash of ids, questions and answers in order: one JSON array `[id, question, answer]` a line, UTF-8."""
    arrays = ([problem.id, problem.question, problem.answer] for problem in problems)
    return _sha256((json.dumps(array, ensure_ascii=False) + "\n").encode() for array in arrays)


# --- where the problems come from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """The source files of train and test; `fetch` gives their paths, and only it may download."""

    name: str
    revision: str
    fetch: Callable[[], dict[str, Path]]


def _hub(revision: str, cache_dir: Path | None) -> _Origin:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        revision = _resolve(revision)
    return _Origin(REPO, revision, lambda: _download(revision, cache_dir))


def _resolve(revision: str) -> str:
    """The commit that a branch, a tag or a short hash stands for now; fails at once without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        sha = HfApi().dataset_info(REPO, revision=revision).sha
    except RevisionNotFoundError:
        raise UserError(f"{REPO} has no revision {revision!r} on the hub") from None
    except _hub_errors() as error:
        raise _unreachable(revision, error) from error
    assert sha is not None, "the hub answered without a commit"
    return sha


def _download(commit: str, cache_dir: Path | None) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(name: str, local_files_only: bool) -> Path:
        return Path(
            hf_hub_download(
                REPO,
                name,
                repo_type="dataset",
                revision=commit,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    try:
        files = {split: get(name, local_files_only=True) for split, name in _REMOTE.items()}
    except LocalEntryNotFoundError:
        _resolve(commit)  # a download would retry for half a minute before it says that there is no network
        try:
            files = {split: get(name, local_files_only=False) for split, name in _REMOTE.items()}
        except _hub_errors() as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskError(f"the hub's cache cannot be written: {error.strerror}") from error
            raise _unreachable(commit, error) from error
    if commit == PINNED:
        for split, path in files.items():
            if (found := sha256_file(path)) != PINNED_SHA256[split]:
                expected = PINNED_SHA256[split]
                what = f"sha256 is {found}, not {expected} as in {REPO} at {commit}; delete it and run again"
                raise DataError(path, what)
    return files


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a call to the hub raises: its own errors, `OSError`, and those of its HTTP client."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return EntryNotFoundError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def _unreachable(revision: str, error: BaseException) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"{REPO} at {revision} cannot be fetched from the hub: {reason}; {_NOT_THE_HUB}")


def _folder(folder: Path) -> _Origin:
    if not folder.is_dir():
        raise DataError(folder, "is no folder; --source is `hub` or a folder with train.jsonl and test.jsonl")
    if (folder / "snapshot.json").exists():
        return _snapshot(folder)
    if (folder / "manifest.json").exists() and (folder / "val.jsonl").exists():
        raise DataError(folder, "is split already, so it cannot be a source; use it as it is")
    files = {split: folder / f"{split}.jsonl" for split in _REMOTE}
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
    if set(files) != set(_REMOTE):
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


def _split(origin: _Origin, eval_n: int, seed: int) -> dict[str, list[Problem]]:
    files = origin.fetch()
    train, test = (_source_problems(files[split], split) for split in ("train", "test"))
    if eval_n >= len(train):
        raise ConfigError(
            f"eval_n {eval_n} leaves no problem to train on: the source has {len(train)}; choose an eval_n below that"
        )
    shuffled = list(range(len(train)))
    random.Random(seed).shuffle(shuffled)
    reserved = set(shuffled[:eval_n])
    return {
        "train": [problem for i, problem in enumerate(train) if i not in reserved],
        "val": [problem for i, problem in enumerate(train) if i in reserved],
        "test": test,
    }


def _source_problems(path: Path, split: str) -> list[Problem]:
    """The rows of a source file; whatever ids they have, the index is the id."""
    problems = []
    rows = _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)
    for index, (line, row) in enumerate(rows):
        try:
            problem = problem_from_row({key: row[key] for key in row if key != "id"})
        except ValueError as fault:
            raise DataError(path, str(fault), line) from None
        problems.append(dataclasses.replace(problem, id=f"gsm8k-{split}-{index:05d}"))
    return problems


def _parquet_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(path, f"is no parquet file: {str(error).splitlines()[0]}") from None
    return enumerate(rows, 1)


# --- what is there already ----------------------------------------------------------------------------------


def _read_manifest(out_dir: Path) -> Manifest:
    path = out_dir / "manifest.json"
    if not path.exists():
        raise DataError(path, f"does not exist; make the data with `grpo-gsm8k data --out_dir {out_dir}`")
    fields = read_json(path)
    if fields.pop("format", None) != FORMAT:
        raise DataError(path, f"is no data manifest of format {FORMAT}; choose another folder")
    try:
        counts, files, content = (fields.pop(key) for key in ("counts", "files", "content"))
        sound = set(counts) == set(content) == set(SPLITS) and set(files) == {f"{s}.jsonl" for s in SPLITS}
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(path, f"is damaged; {_MEND}")
    return Manifest(path, provenance=fields, counts=counts, files=files, content=content)


def _refuse_difference(manifest: Manifest, provenance: Mapping[str, Any]) -> None:
    there, asked = manifest.provenance, provenance
    keys = [key for key in dict.fromkeys([*asked, *there]) if there.get(key) != asked.get(key)]
    if keys:
        what = ", ".join(f"{key} {there.get(key)!r} and not {asked.get(key)!r}" for key in keys)
        raise DataError(manifest.path, f"was made with {what}; choose another --out_dir")


def _refuse_foreign(path: Path) -> None:
    """Without a manifest, only what an earlier, killed run wrote may be replaced."""
    if not path.exists():
        return
    try:
        _, row = next(iter(read_jsonl(path)))
    except DataError:
        row = {}
    if tuple(row) != KEYS:
        raise DataError(path, "was there before and is not of this command; choose another --out_dir")


def _compare(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Name the first row of the file that is not the row it should be."""
    if not path.exists():
        raise DataError(path, f"is missing, though the manifest lists it; {_MEND}")
    line = 0
    for line, raw in read_lines(path):
        if line > len(rows):
            raise DataError(path, f"has a row too many; {_MEND}", line)
        expected = rows[line - 1]
        if raw != json_line(expected):
            try:
                found = problem_from_row(json.loads(raw))
            except ValueError as fault:
                raise DataError(path, f"was changed after it was written: {fault}; {_MEND}", line) from None
            keys = [key for key in expected if getattr(found, key) != expected[key]]
            what = f"{', '.join(keys)} of {expected['id']}" if keys else f"the form of {expected['id']}"
            raise DataError(path, f"{what} was changed after it was written; {_MEND}", line)
    if line < len(rows):
        raise DataError(path, f"the row of {rows[line]['id']} is missing; {_MEND}", line + 1)


def _summary(manifest: Manifest, verified: bool) -> DataSummary:
    return DataSummary(**manifest.counts, manifest=manifest.path, verified=verified)


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


# --- the command --------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m grpo_gsm8k.data_prep`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_gsm8k.data_prep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out-dir", "--out_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--source", default="hub", metavar="hub|DIR", help="default: hub")
    parser.add_argument("--eval-n", "--eval_n", type=int, default=EVAL_N, metavar="N", help="default: 512")
    parser.add_argument("--seed", type=int, default=SEED, help="default: 31415")
    parser.add_argument("--revision", default=PINNED, help=f"default: {PINNED}")
    parser.add_argument("--cache-dir", "--cache_dir", type=Path, metavar="DIR")
    parser.add_argument("--snapshot-dir", "--snapshot_dir", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    try:
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
