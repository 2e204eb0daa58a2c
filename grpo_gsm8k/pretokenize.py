"""Stage 3: token ids for one model: pairs to train on, and an evaluation set.

`tokenize` turns a file of pairs into shards of one width (trainer/token_shards.py has their form). A shard is made of
`--shard_rows` lines of the file in any case, so processes make shards in parallel, each in the memory of one shard, and
a killed run continues at the next shard and ends with the same bytes. Every line is checked before the first shard is
made. `sft --data_path FOLDER` trains on them as on the file.

    grpo-gsm8k tokenize --model_id MODEL --data_path pairs.jsonl --out_dir shards --max_total_tokens 1024 --workers 4
    python scripts/shell/pretokenize_r1_pairs.py --infile pairs.jsonl --model_id MODEL --format pt

`prep-eval` renders every problem of an evaluation set once, by the renderer that training and evaluation use, and
writes it with what is needed to read, sample and grade it:

    id, question, answer     as in the data; `answer` is the reference solution
    gold, gold_num           the final answer, as text and as a number
    prompt                   the rendered text, for people and other tools
    prompt_token_ids         what is sampled from; text is never tokenised again
    rendered                 prompt style, tags, a hash of vocabulary and chat template, and the date if that writes it

`eval --eval_path` and `--eval_set_path` take these rows as they take the problems themselves, and refuse them for
a model that would be asked otherwise.

    grpo-gsm8k prep-eval --model_id MODEL --data DIR --split val --out val_for_vllm.jsonl
    python scripts/shell/prep_val_for_vllm.py --infile DIR/val.jsonl --model_id MODEL --outfile F
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

from grpo_gsm8k.config import PrepEvalConfig, TokenizeConfig
from grpo_gsm8k.datatypes import Example, Source
from grpo_gsm8k.errors import ConfigError, DataError, GrpoError
from grpo_gsm8k.runs.files import read_json, read_lines, real_path, sha256_file, write_json, write_jsonl
from grpo_gsm8k.runs.progress import progress
from grpo_gsm8k.tasks.base import load_examples, load_split
from grpo_gsm8k.tasks.conversations import read_chat
from grpo_gsm8k.tasks.render import Renderer, date_of, task_of
from grpo_gsm8k.trainer.policy import load_tokenizer
from grpo_gsm8k.trainer.token_shards import MANIFEST, pack, read_shard, write_shard

TOKENIZED = Path("artifacts/tokenized")


# ---------------------------------------------------------------------------------------------- pairs → shards


class Chunk(NamedTuple):
    """The lines of a shard."""

    number: int
    offset: int  # of its first byte
    first_line: int  # 1-based
    lines: int


def tokenize(cfg: TokenizeConfig) -> dict[str, Any]:
    """Make the missing shards, then the manifest; return the command's result.

    Raises:
        DataError: an error in the pairs, with file and line; nothing is written then.
        ConfigError: the folder holds other files.
    """
    for name in ("max_total_tokens", "shard_rows", "workers"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    folder = Path(cfg.out_dir)
    renderer = renderer_of(cfg)
    chunks, digest = survey(Path(cfg.data_path), cfg.shard_rows, renderer)
    begin(
        folder,
        plan := {
            "made_with": renderer.made_with(),
            "input": {"sha256": digest, "rows": sum(chunk.lines for chunk in chunks)},
            "pad_token_id": renderer.pad_id,
            **{name: getattr(cfg, name) for name in ("train_on", "max_total_tokens", "shard_rows", "format")},
        },
    )
    make_shards(cfg, chunks)
    shards = [describe(shard_path(cfg, chunk), cfg.format) for chunk in chunks]
    totals = {name: sum(shard[name] for shard in shards) for name in ("rows", "left_out", "tokens", "trained_tokens")}
    if not totals["rows"]:
        raise DataError(cfg.data_path, f"no example fits into {cfg.max_total_tokens} tokens; raise --max_total_tokens")
    for torn in folder.glob(".tmp-*"):  # left over from a kill
        torn.unlink(missing_ok=True)
    write_json(folder / MANIFEST, {**plan, **totals, "shards": shards})
    said = {"written": totals.pop("rows"), **totals, "shards": len(shards)}
    return {**said, "path": str(folder), "manifest": str(folder / MANIFEST), **plan["made_with"]}


@functools.cache
def renderer_of(cfg: TokenizeConfig) -> Renderer:
    """The renderer of a config, made once per process."""
    return Renderer.of(cfg, load_tokenizer(cfg))


def survey(path: Path, shard_rows: int, renderer: Renderer) -> tuple[list[Chunk], str]:
    """The start of each shard's lines, and the file's sha256. Raises `DataError` for the first invalid line."""
    digest, chunks, offset, number = hashlib.sha256(), list[Chunk](), 0, 0
    for number, raw in read_lines(path):
        example, faults = read_chat(raw)
        if example is None:
            raise DataError(path, f"{faults[0]}; `grpo-gsm8k validate --data {path}` lists every error", number)
        renderer.check_texts(example.messages, example.raw, Source(str(path), number))
        if (number - 1) % shard_rows == 0:
            chunks.append(Chunk(len(chunks), offset, number, shard_rows))
        digest.update(raw)
        offset += len(raw)
    chunks[-1] = chunks[-1]._replace(lines=number - chunks[-1].first_line + 1)
    return chunks, digest.hexdigest()


def begin(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan into a new folder, or continue in one with the same plan."""
    path = folder / MANIFEST
    before = read_json(path) if path.is_file() else {}
    if "made_with" in before:
        if changed := [key for key in plan if before.get(key) != plan[key]]:
            raise ConfigError(f"{folder}: was begun with another {', '.join(changed)}; pick another --out_dir")
    elif path.exists() or (folder.exists() and any(folder.glob("shard_*"))):
        raise ConfigError(f"{folder}: holds shards or a manifest of something else; pick another --out_dir")
    else:
        write_json(path, plan)


def shard_path(cfg: TokenizeConfig, chunk: Chunk) -> Path:
    """The path of a shard."""
    return Path(cfg.out_dir) / f"shard_{chunk.number:05d}.{cfg.format}"


def make_shards(cfg: TokenizeConfig, chunks: Sequence[Chunk]) -> None:
    """Make the missing shards, in this process or in several."""
    missing = [chunk for chunk in chunks if not shard_path(cfg, chunk).exists()]
    with progress("tokenize", len(chunks), len(chunks) - len(missing)) as bar:
        if cfg.workers == 1 or len(missing) < 2:
            for chunk in missing:
                make_shard(cfg, chunk)
                bar.update(bar.done + 1)
            return
        spawn = multiprocessing.get_context("spawn")
        shares = [missing[n :: cfg.workers] for n in range(min(cfg.workers, len(missing)))]
        refused = spawn.SimpleQueue()
        workers = [spawn.Process(target=work, args=(cfg, share, refused), daemon=True) for share in shares]
        for worker in workers:
            worker.start()
        while alive := [worker for worker in workers if worker.is_alive()]:
            alive[0].join(0.5)
            if (done := sum(shard_path(cfg, chunk).exists() for chunk in chunks)) > bar.done:
                bar.update(done)
        if not refused.empty():
            raise DataError(*refused.get())
        if any(worker.exitcode for worker in workers):
            raise GrpoError("a tokenizing process failed (see its output above); run the same command to continue")


def work(cfg: TokenizeConfig, chunks: Sequence[Chunk], refused: SimpleQueue[tuple[str, str, int | None]]) -> None:
    """Make one process' share. The parent handles Ctrl-C; without a parent the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    try:
        for chunk in itertools.takewhile(lambda _: parent and parent.is_alive(), chunks):
            make_shard(cfg, chunk)
    except DataError as fault:  # the parent reports a row that cannot be trained on
        refused.put((str(fault.path), fault.what, fault.line))


def make_shard(cfg: TokenizeConfig, chunk: Chunk) -> None:
    """Tokenize some lines of the file, and write the rows that fit."""
    renderer, rows = renderer_of(cfg), []
    with Path(cfg.data_path).open("rb") as handle:
        handle.seek(chunk.offset)
        for line, raw in enumerate(itertools.islice(handle, chunk.lines), chunk.first_line):
            example, faults = read_chat(raw)
            assert example, faults  # checked before
            source = Source(cfg.data_path, line)
            row = renderer.chat(example.messages, cfg.train_on, example.raw, source)
            if len(row.token_ids) <= cfg.max_total_tokens:
                rows.append(row)
    meta = {"first_line": chunk.first_line, "lines": chunk.lines, "rows": len(rows)}
    write_shard(shard_path(cfg, chunk), pack(rows, cfg.max_total_tokens, renderer.pad_id), meta, cfg.format)


def describe(path: Path, format: str) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    shard = read_shard(path, format)
    rows, lines = shard["meta"]["rows"], shard["meta"]["lines"]
    tokens = {"tokens": int(shard["lengths"].sum()), "trained_tokens": int(shard["response_mask"].sum())}
    return {"file": path.name, "rows": rows, "left_out": lines - rows, **tokens, "sha256": sha256_file(path)}


# ------------------------------------------------------------------------------- problems → an evaluation set


def run(cfg: PrepEvalConfig) -> dict[str, Any]:
    """Render the problems of a file and write the rows; return the command's result.

    Raises:
        ConfigError: the rows would replace the problems themselves.
        DataError: an error in the problems, with file and line.
    """
    source = Path(cfg.eval_path or Path(cfg.data) / f"{cfg.split}.jsonl")
    out = Path(cfg.out or TOKENIZED / f"{source.stem}_for_vllm.jsonl")
    if real_path(out) == real_path(source):
        raise ConfigError(f"--out is {out}, which holds the problems themselves; choose another file")
    task = task_of(cfg)
    examples = load_examples(task, source) if cfg.eval_path else load_split(task, cfg.data, cfg.split)
    renderer = Renderer(load_tokenizer(cfg), task, date=date_of(cfg))
    made_with = renderer.made_with()
    rows = [prepared_row(renderer, example, made_with) for example in examples[: cfg.limit or None]]
    write_jsonl(out, rows)
    longest = max(len(row["prompt_token_ids"]) for row in rows)
    return {"written": len(rows), "path": str(out), "source": str(source), "longest_prompt": longest, **made_with}


def prepared_row(renderer: Renderer, example: Example, made_with: Mapping[str, str | None]) -> dict[str, Any]:
    """One row of the set. It replaces a stored prompt, so a set can be rendered again."""
    ids = renderer.render(example).token_ids
    return {
        **renderer.task.row(example),
        "prompt": renderer.spell(ids),
        "prompt_token_ids": ids,
        "rendered": made_with,
    }


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("prep-eval")
