"""Evaluation sets by name: `data --dataset gsm_plus --out_dir DIR`, and `eval --dataset gsm8k,gsm_plus,math500`.

Nothing of them is in the package. Each is fetched from the hub at a pinned commit, checked row by row, and written as
the files that `eval` reads: `test.jsonl`, `train.jsonl` and `val.jsonl` where the set has training problems, and
`manifest.json` with source, commit, licence and hashes. A set without a pin is resolved when it is first fetched; the
manifest keeps the commit, and running again verifies against it.

A perturbed set rewrites the problems of another. Its rows name the problem they come from (`seed_id`) and, where the
set says it, how they were changed (`perturbation`); `seeds.jsonl` holds those originals. `seed_id` is a hash of the
original question, so that it finds the same problem in GSM8K's own test split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k import data_prep
from grpo_gsm8k.config import DATASETS
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.files import read_jsonl, sha256_file
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import seed_id, text_of
from grpo_gsm8k.tasks.dataset import Manifest, read_manifest, refuse_difference, reserve, verify, write_splits
from grpo_gsm8k.tasks.gsm8k.grading import parse_number
from grpo_gsm8k.tasks.gsm8k.problems import KEYS, example_from_row, row_of

Row = dict[str, Any]
SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)


class LeftOut(Exception):
    """A row that cannot be graded; its message is the reason that the manifest counts."""


@dataclass(frozen=True)
class EvalSet:
    """Where a set is, and how its rows are read.

    Attributes:
        repo, revision: on the hub; an empty revision is resolved at the first download.
        licence: as its card says.
        files: split → its files there.
        task: grades it.
        read: a row of the source as a row of ours, without the id. Raises `LeftOut`, or `ValueError` for a fault.
        seed: the original of a perturbed row, in the same way.
    """

    repo: str
    revision: str
    licence: str
    files: Mapping[str, tuple[str, ...]]
    task: str
    read: Callable[[Row], Row]
    seed: Callable[[Row], Row] | None = None


def _word_problem(row: Row) -> Row:
    """A row as GSM8K has it, with the columns that the set adds."""
    named = ("question", "answer", "id")
    return {**{key: row[key] for key in row if key not in named}, **_gsm8k(row, "question", text_of(row, "answer"))}


def _gsm8k(row: Row, question: str, answer: str) -> Row:
    if "####" in answer and parse_number(answer.rpartition("####")[2]) is None:
        raise LeftOut("no number to grade against")
    made = row_of(example_from_row({"question": text_of(row, question), "answer": answer}))
    return {key: made[key] for key in KEYS if key != "id"}


def _gsm_plus(row: Row) -> Row:
    """Without the `critical thinking` rows: a number is missing in the question, and so is one to grade against."""
    kind = text_of(row, "perturbation_type")
    made = _bare(row, "question", "solution", "answer", kind)
    return {**made, "seed_id": seed_id(text_of(row, "seed_question")), "perturbation": kind}


def _gsm_plus_seed(row: Row) -> Row:
    return _bare(row, "seed_question", "seed_solution", "seed_answer", "original")


def _bare(row: Row, question: str, solution: str, answer: str, kind: str) -> Row:
    """A row whose answer is a bare number beside the solution."""
    if not isinstance(row.get(answer), str) or parse_number(row[answer]) is None:
        raise LeftOut(f"{kind}: no number to grade against")
    return _gsm8k(row, question, f"{row.get(solution) or ''}\n#### {row[answer].strip()}")


def _gsm_symbolic(row: Row) -> Row:
    made = _gsm8k(row, "question", text_of(row, "answer"))
    named: Row = {key: row[key] for key in ("instance", "original_id") if key in row}
    return {**made, **named, "seed_id": seed_id(text_of(row, "original_question"))}


def _gsm_symbolic_seed(row: Row) -> Row:
    return _gsm8k(row, "original_question", text_of(row, "original_answer"))


def _math(row: Row) -> Row:
    """A row of MATH or MATH-500; the answer is the row's own, else the last box of its solution."""
    text_of(row, "problem"), text_of(row, "solution")
    try:
        example = load_task("math").example({key: row[key] for key in row if key not in ("id", "unique_id")})
    except ValueError as fault:
        raise LeftOut(str(fault).partition(":")[0]) from None
    named = {"id": text_of(row, "unique_id")} if "unique_id" in row else {}
    return {**named, "problem": example.messages, "answer": example.answer, **example.meta}


SETS = {
    "gsm8k": EvalSet(
        data_prep.REPO, data_prep.PINNED, "MIT", {k: (v,) for k, v in data_prep.REMOTE.items()}, "gsm8k", _word_problem
    ),
    "gsm8k_platinum": EvalSet(  # arXiv 2502.03461
        "madrylab/gsm8k-platinum",
        "",
        "MIT",
        {"test": ("main/test-00000-of-00001.parquet",)},
        "gsm8k",
        _word_problem,
    ),
    "gsm_plus": EvalSet(  # arXiv 2402.19255
        "qintongli/GSM-Plus",
        "3b708db57b96a16e8e3368ed2956990c0809440e",
        "CC-BY-SA-4.0",
        {"test": ("data/test-00000-of-00001.jsonl",)},
        "gsm8k",
        _gsm_plus,
        _gsm_plus_seed,
    ),
    "gsm_symbolic": EvalSet(  # arXiv 2410.05229
        "apple/GSM-Symbolic",
        "93b5b3758d9d9841ffe81d6cd2ae2b030685b078",
        "CC-BY-NC-ND-4.0",
        {"test": ("main/test.jsonl",)},
        "gsm8k",
        _gsm_symbolic,
        _gsm_symbolic_seed,
    ),
    "math": EvalSet(  # arXiv 2103.03874
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        "MIT",
        {split: tuple(f"{s}/{split}-00000-of-00001.parquet" for s in SUBJECTS) for split in ("train", "test")},
        "math",
        _math,
    ),
    "math500": EvalSet(  # arXiv 2305.20050
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "not declared on its card; its problems are MATH's (MIT)",
        {"test": ("test.jsonl",)},
        "math",
        _math,
    ),
}
assert tuple(SETS) == DATASETS, "config.py names them, and does not import this module"


def prepare(
    name: str,
    out_dir: Path,
    source: str | Path = "hub",
    eval_n: int = data_prep.EVAL_N,
    seed: int = data_prep.SEED,
    revision: str = "",
    cache_dir: Path | None = None,
    snapshot_dir: Path | None = None,
) -> dict[str, Any]:
    """Make a set's files in `out_dir`, or verify those that are there; returns what `data` prints.

    Args:
        source: "hub", or a folder with the set's own files, under the names they have on the hub or as `test.jsonl`
            and `train.jsonl`.
        eval_n, seed: as for GSM8K, where the set has training problems.
        revision: another commit, branch or tag than the pinned one.

    Raises:
        ConfigError: there is no such set.
        DataError: a row of the source is not of its form, or the folder holds something else.
    """
    wanted = named(name)
    if name == "gsm8k":
        pin = {"revision": revision} if revision else {}
        made = data_prep.prepare(out_dir, source, eval_n, seed, cache_dir=cache_dir, snapshot_dir=snapshot_dir, **pin)
        return _summary(read_manifest(out_dir), name, wanted, made.verified)
    if snapshot_dir:
        raise ConfigError("--snapshot_dir keeps GSM8K's source files; of other sets the manifest has the commit")
    before = read_manifest(out_dir) if (out_dir / "manifest.json").exists() else None
    if before and not revision and source == "hub" and before.provenance.get("dataset") == name:
        revision = str(before.provenance.get("revision", ""))
    origin = _folder(Path(source), wanted) if source != "hub" else _hub(wanted, revision, cache_dir)
    provenance: dict[str, Any] = {"dataset": name, "source": origin.name, "revision": origin.revision}
    provenance |= {"licence": wanted.licence, "task": wanted.task}
    if "train" in wanted.files:
        provenance |= {"seed": seed, "eval_n": eval_n}
    if before:
        known = {key: value for key, value in before.provenance.items() if key != "left_out"}
        refuse_difference(Manifest(before.path, known, {}, {}, {}), provenance)
        return _summary(verify(out_dir, load_task(wanted.task)), name, wanted, verified=True)
    rows, left_out = _read(name, wanted, origin.fetch())
    if "train" in rows:
        rows = _reserved(rows, eval_n, seed)
    write_splits(out_dir, rows, {**provenance, "left_out": left_out}, load_task(wanted.task))
    return _summary(read_manifest(out_dir), name, wanted, verified=False)


def named(name: str) -> EvalSet:
    """The set of this name. Raises `ConfigError` with the names there are."""
    if name not in SETS:
        raise ConfigError(f"--dataset {name}: known are {', '.join(SETS)}")
    return SETS[name]


def _summary(manifest: Manifest, name: str, wanted: EvalSet, verified: bool) -> dict[str, Any]:
    source, revision = manifest.provenance["source"], manifest.provenance["revision"]
    left_out = manifest.provenance.get("left_out", {})
    say(f"{name}: {source} at {revision}, licence {wanted.licence}")
    for reason, count in left_out.items():
        say(f"{name}: {count} rows left out, {reason}")
    counts: dict[str, Any] = {"train": 0, "val": 0, "test": 0, **manifest.counts}
    more = {"dataset": name, "source": source, "revision": revision, "licence": wanted.licence, "task": wanted.task}
    return {**counts, "manifest": str(manifest.path), "verified": verified, **more, "left_out": left_out}


# --- the source files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """The source files of each split; only `fetch` may download."""

    name: str
    revision: str
    fetch: Callable[[], dict[str, list[Path]]]


def _hub(wanted: EvalSet, revision: str, cache_dir: Path | None) -> _Origin:
    commit = revision or wanted.revision
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        commit = data_prep.resolve(wanted.repo, commit or "main")
        say(f"{wanted.repo} is not pinned to a commit here: it is at {commit} now, and the manifest keeps that")

    def fetch() -> dict[str, list[Path]]:
        names = {name: name for files in wanted.files.values() for name in files}
        found = data_prep.download(wanted.repo, commit, names, cache_dir)
        return {split: [found[name] for name in files] for split, files in wanted.files.items()}

    return _Origin(wanted.repo, commit, fetch)


def _folder(folder: Path, wanted: EvalSet) -> _Origin:
    if not folder.is_dir():
        raise DataError(folder, "is no folder; --source is `hub` or a folder with the set's files")
    files = {split: list(_files_in(folder, split, names)) for split, names in wanted.files.items()}
    listing = "".join(f"{sha256_file(path)}  {path.name}\n" for paths in files.values() for path in paths)
    return _Origin("folder", f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", lambda: files)


def _files_in(folder: Path, split: str, names: tuple[str, ...]) -> Iterator[Path]:
    """A split's files as they are called on the hub, or one file called after the split."""
    whole = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet")]
    if alone := next((path for path in whole if path.is_file()), None):
        yield alone
        return
    for name in names:
        path = next((path for path in (folder / name, folder / Path(name).name) if path.is_file()), None)
        if path is None:
            raise DataError(folder / name, f"does not exist; a source folder has the hub's files, or {split}.jsonl")
        yield path


# --- its rows -----------------------------------------------------------------------------------------------


def _read(name: str, wanted: EvalSet, files: Mapping[str, list[Path]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows of each split, the originals of a perturbed set among them, and how many were left out and why."""
    splits: dict[str, list[Row]] = {split: [] for split in files}
    seeds: dict[str, Row] = {}
    left_out: dict[str, int] = {}
    for split, paths in files.items():
        for index, (path, line, row) in enumerate(_source_rows(paths)):
            try:
                if wanted.seed:
                    _keep_seed(seeds, wanted.seed(row))
                splits[split].append({"id": f"{name}-{split}-{index:05d}", **wanted.read(row)})
            except LeftOut as reason:
                left_out[str(reason)] = left_out.get(str(reason), 0) + 1
            except ValueError as fault:
                raise DataError(path, str(fault), line) from None
        if not splits[split]:
            raise DataError(paths[0], f"has no row of {name} that can be graded")
    if wanted.seed:
        used = {row["seed_id"] for row in splits["test"]}
        return {"seeds": [row for key, row in seeds.items() if key in used], **splits}, left_out
    return splits, left_out


def _keep_seed(seeds: dict[str, Row], row: Row) -> None:
    key = seed_id(row["question"])
    if parse_number(seeds.setdefault(key, {"id": key, **row})["gold"]) != parse_number(row["gold"]):
        raise LeftOut("an earlier row has another answer to the original question")


def _source_rows(paths: list[Path]) -> Iterator[tuple[Path, int, Row]]:
    for path in paths:
        rows = data_prep.parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)
        for line, row in rows:
            yield path, line, row


def _reserved(rows: Mapping[str, list[Row]], eval_n: int, seed: int) -> dict[str, list[Row]]:
    """Validation problems reserved from train, as GSM8K's are."""
    train = rows["train"]
    if not 0 < eval_n < len(train):
        raise ConfigError(f"eval_n {eval_n} must be at least 1 and leave a problem to train on, of {len(train)}")
    left, val = reserve(train, eval_n, seed)
    return {"train": left, "val": val, "test": rows["test"]}
