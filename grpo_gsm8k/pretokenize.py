"""Stage 3: an evaluation set as one model will see it.

Every problem is rendered once, by the renderer that training and evaluation use, and written with what is needed
to read, sample and grade it:

    id, question, answer     as in the data; `answer` is the reference solution
    gold, gold_num           the final answer, as text and as a number
    prompt                   the rendered text, for people and other tools
    prompt_token_ids         what is sampled from; text is never tokenised again
    rendered                 prompt style, tags, and a hash of vocabulary and chat template

`eval --eval_path` and `--eval_set_path` take these rows as they take the problems themselves, and refuse them for
a model that would be asked otherwise.

    grpo-gsm8k prep-eval --model_id MODEL --data DIR --split val --out val_for_vllm.jsonl
    python scripts/shell/prep_val_for_vllm.py --infile DIR/val.jsonl --model_id MODEL --outfile F
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import PrepEvalConfig
from grpo_gsm8k.datatypes import Problem
from grpo_gsm8k.errors import ConfigError
from grpo_gsm8k.gsm8k.problems import gold_number, load_problems, load_split
from grpo_gsm8k.gsm8k.prompts import Renderer, how_to_ask
from grpo_gsm8k.runs.files import write_jsonl
from grpo_gsm8k.trainer.policy import load_tokenizer

TOKENIZED = Path("artifacts/tokenized")


def run(cfg: PrepEvalConfig) -> dict[str, Any]:
    """Render the problems of a file, write the rows, return what the command prints.

    Raises:
        ConfigError: the rows would replace the problems that they are made of.
        DataError: a fault in the problems, with file and line.
    """
    source = Path(cfg.eval_path or Path(cfg.data) / f"{cfg.split}.jsonl")
    out = Path(cfg.out or TOKENIZED / f"{source.stem}_for_vllm.jsonl")
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out is {out}, which holds the problems themselves; choose another file")
    problems = load_problems(source) if cfg.eval_path else load_split(Path(cfg.data), cfg.split)
    renderer = Renderer(load_tokenizer(cfg), *how_to_ask(cfg))
    made_with = renderer.made_with()
    rows = [prepared_row(renderer, problem, made_with) for problem in problems[: cfg.limit or None]]
    write_jsonl(out, rows)
    longest = max(len(row["prompt_token_ids"]) for row in rows)
    return {"written": len(rows), "path": str(out), "source": str(source), "longest_prompt": longest, **made_with}


def prepared_row(renderer: Renderer, problem: Problem, made_with: Mapping[str, str | None]) -> dict[str, Any]:
    """One row of the set. A prompt that the problem already comes with is replaced, so a set can be made again."""
    ids = renderer.render(problem).token_ids
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "gold": problem.gold,
        "gold_num": gold_number(problem.gold),
        "prompt": renderer.spell(ids),
        "prompt_token_ids": ids,
        "rendered": made_with,
    }


if __name__ == "__main__":
    from grpo_gsm8k.cli import run_command

    run_command("prep-eval")
