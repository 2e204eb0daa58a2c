"""The same model, the same problems, and EleutherAI's lm-evaluation-harness beside our own evaluation.

    uv run --extra lm-eval python scripts/against_lm_eval.py RESULTS.jsonl
    uv run --extra lm-eval python scripts/against_lm_eval.py RESULTS.jsonl --model_id M --train DIR/train.jsonl
    uv run --extra lm-eval python scripts/against_lm_eval.py RESULTS.jsonl --model_id M --base_url http://localhost:8000/v1
    uv run --extra lm-eval python scripts/against_lm_eval.py --model_id M --suite arc_easy,hellaswag --out after.json \\
        --baseline before.json

RESULTS is what `grpo-gsm8k eval` wrote; its first completion of each problem counts. lm-eval's own gsm8k task judges,
its filters and its metric: only the data files are local (`include:` of its YAML, `dataset_path: json`). Three steps,
from the narrowest question to the widest:

same completions  lm-eval grades our completions: do the graders agree?
same prompts      with --model_id: its hf backend answers the very prompts that ours answered: do the engines agree?
own prompts       with --train, too: its own prompt and examples, 256 tokens at most: does the score mean the same?

With --base_url, lm-eval's `local-completions` asks a server (`grpo-gsm8k serve`, key in OPENAI_API_KEY) in place of its
hf backend; --model_id names the tokenizer's folder, --served_name the model there.

docs/lm-eval.md explains the classes of disagreement that are counted here.

--suite runs tasks by name and keeps the verdict on each document; against --baseline, a file of the same kind, every
task is compared document by document (mid-p sign flips, Holm over the tasks), and a loss that is no noise ends with
exit code 1. Most tasks fetch their data from the hub; `--tasks_dir` adds local ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from grpo_gsm8k.errors import ConfigError, DataError, GrpoError
from grpo_gsm8k.evals import stats
from grpo_gsm8k.evals.accuracy import read_rows
from grpo_gsm8k.evals.compare import corrected_for_number
from grpo_gsm8k.runs.files import read_json, write_json, write_jsonl
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import load_examples
from grpo_gsm8k.tasks.gsm8k.grading import extract, grade
from grpo_gsm8k.tasks.gsm8k.problems import row_of

TASK = "gsm8k_local"
FILTERS = {"strict": "strict-match", "flexible": "flexible-extract"}  # our grading → lm-eval's filter
INVALID = "[invalid]"  # what its filters say where they find nothing
Row = dict[str, Any]


class Recorded(LM):
    """A model that says what was said before: id of the problem → response."""

    def __init__(self, said: Mapping[str, str]) -> None:
        super().__init__()
        self.said = said

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The response to each, cut where lm-eval's own backend would have stopped."""
        return [re.split("|".join(map(re.escape, r.args[1]["until"])), self.said[r.doc["id"]])[0] for r in requests]

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Is never asked for."""
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> Any:
        """Is never asked for."""
        raise NotImplementedError


def gsm8k_task(folder: Path, rows: Sequence[Row], train: Path | None = None, **changes: Any) -> Path:
    """A folder with lm-eval's gsm8k task over local files, otherwise as it is but for `changes`."""
    keys = ("id", "question", "answer", "prompt")  # the same in both: `datasets` wants one schema
    shown = [{**row_of(e), "prompt": ""} for e in load_examples(load_task("gsm8k"), train)] if train else rows
    for name, given in (("test", rows), ("train", shown)):
        write_jsonl(folder / f"{name}.jsonl", [{key: row[key] for key in keys} for row in given])
    files = {name: str(folder / f"{name}.jsonl") for name in ("test", "train")}
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"),
        "task": TASK,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **changes,
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def verdicts(model: Any, tasks_dir: Path, shots: int = 0, **more: Any) -> dict[str, dict[str, Any]]:
    """Problem id → lm-eval's verdict (bool) and what it extracted, of each filter; and the response."""
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[TASK], num_fewshot=shots, task_manager=manager, bootstrap_iters=0, **more
    )
    judged: dict[str, dict[str, Any]] = {}
    for sample in found["samples"][TASK]:
        one = judged.setdefault(sample["doc"]["id"], {"response": sample["resps"][0][0]})
        one[sample["filter"]] = bool(sample["exact_match"])
        one[f"{sample['filter']} extracted"] = sample["filtered_resps"][0]
    return judged


def disagreement(response: str, gold: str, lm_said: str, mode: str) -> str:
    """The class (docs/lm-eval.md) of a completion that the two graders judge differently."""
    ours_right, ours_said = grade(response, gold, mode), extract(response, mode)  # type: ignore[arg-type]
    if re.search(r"</?think>", response):
        return "thoughts"
    if not ours_right:
        return "no commitment" if ours_said is None else "another of several answers"
    if re.sub("[,$]", "", str(ours_said)) != re.sub("[,$]", "", gold):
        return "number spelled otherwise"
    if lm_said == INVALID:
        return "marker spelled otherwise" if "####" in response else "another marker"
    if not re.search(r"\d", lm_said):
        return "punctuation taken for a number"
    return "another of several answers" if mode == "strict" else "last number is not the answer"


def agreement(rows: Mapping[str, Row], judged: Mapping[str, Mapping[str, Any]], same_text: bool) -> dict[str, Any]:
    """Both gradings against lm-eval's filters: the four counts, paired test, classes where the text is the same."""
    report: dict[str, Any] = {"n": len(rows)}
    if not same_text:
        report["same_responses"] = sum(judged[key]["response"].strip() == rows[key]["response"].strip() for key in rows)
    for mode, name in FILTERS.items():
        ours = {key: bool(row[f"correct_{mode}"]) for key, row in rows.items()}
        theirs = {key: bool(judged[key][name]) for key in rows}
        counts = Counter((theirs[key], ours[key]) for key in rows)
        differ = [key for key in rows if theirs[key] != ours[key]]
        test = stats.compare({k: float(v) for k, v in theirs.items()}, {k: float(v) for k, v in ours.items()})
        entry: dict[str, Any] = {
            "lm_eval": test.accuracy_a,
            "ours": test.accuracy_b,
            "agreement": 1 - len(differ) / len(rows),
            "both_right": counts[True, True],
            "both_wrong": counts[False, False],
            "only_lm_eval_right": counts[True, False],
            "only_we_right": counts[False, True],
            "p_value": test.p_value,
        }
        if same_text:
            why = {
                key: disagreement(rows[key]["response"], rows[key]["gold"], judged[key][f"{name} extracted"], mode)
                for key in differ
            }
            entry["classes"] = dict(Counter(why.values()))
            entry["examples"] = [
                {
                    "id": key,
                    "class": why[key],
                    "gold": rows[key]["gold"],
                    "lm_eval_extracted": judged[key][f"{name} extracted"],
                }
                | {"response": rows[key]["response"][-300:]}
                for key in differ[:5]
            ]
        report[f"{name} / {mode}"] = entry
    return report


def backend(model_id: str, batch: int, base_url: str, served_name: str) -> dict[str, Any]:
    """How lm-eval reaches the model: in its own process, or at a server."""
    if not base_url:
        return {"model": "hf", "model_args": {"pretrained": model_id}, "batch_size": batch, "device": device()}
    args = {"base_url": f"{base_url.rstrip('/')}/completions", "model": served_name or model_id}
    args |= {"tokenizer": model_id, "tokenizer_backend": "huggingface", "num_concurrent": 4}
    return {"model": "local-completions", "model_args": args, "batch_size": batch}


def against(
    results: Path, model_id: str, train: Path | None, shots: int, limit: int, model: dict[str, Any]
) -> dict[str, Any]:
    """All steps that the arguments allow; `model` is a `backend`."""
    rows = {key: own[0] for key, own in list(read_rows(results).items())[: limit or None]}
    needed = {"question", "answer", "prompt", "response", "gold", "correct_strict", "correct_flexible"}
    for key, row in rows.items():
        if missing := needed - row.keys():
            raise DataError(results, f"{key} lacks {', '.join(sorted(missing))}; run `grpo-gsm8k eval` again")
    report: dict[str, Any] = {"results": str(results), "model_id": model_id, "lm_eval": lm_eval.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = gsm8k_task(folder / "recorded", list(rows.values()))
        judged = verdicts(Recorded({key: row["response"] for key, row in rows.items()}), task)
        report["same completions"] = agreement(rows, judged, same_text=True)
        if model_id:
            task = gsm8k_task(folder / "same", list(rows.values()), doc_to_text="{{prompt}}")
            longest = max(row["tokens"] for row in rows.values()) + 1
            judged = verdicts(tasks_dir=task, gen_kwargs={"max_gen_toks": longest}, **model)
            report["same prompts"] = agreement(rows, judged, same_text=False)
        if model_id and train:
            task = gsm8k_task(folder / "own", list(rows.values()), train)
            judged = verdicts(tasks_dir=task, shots=shots, **model)
            report[f"own prompts, {shots} examples"] = agreement(rows, judged, same_text=False)
    return report


def device() -> str:
    """Where lm-eval's hf backend runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------------ suite


def run_suite(model_id: str, tasks: Sequence[str], tasks_dir: str, limit: int, batch: int) -> dict[str, Any]:
    """Task and metric → document → value, with lm-eval's own settings of each task."""
    manager = TaskManager(include_path=tasks_dir or None)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model_id},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit or None,
        batch_size=batch,
        device=device(),
        bootstrap_iters=0,
    )
    values: dict[str, dict[str, float]] = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):  # a metric of whole corpora has no value for a document
                    key = f"{task} {metric} {sample['filter']}"
                    values.setdefault(key, {})[sample["doc_hash"]] = float(sample[metric])
    return {"model_id": model_id, "lm_eval": lm_eval.__version__, "values": values}


def regressions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each task and metric of both, paired over documents; `significant` after Holm's correction.

    Raises:
        UserError: a task was run on other documents.
    """
    names = [name for name in after["values"] if name in before["values"]]
    if not names:
        raise ConfigError("--baseline has no task in common with this run")
    found = [stats.compare(before["values"][name], after["values"][name]) for name in names]
    corrected, p_holm = corrected_for_number(found)
    return [{"task": name, **one.as_dict(), "p_holm": p} for name, one, p in zip(names, corrected, p_holm, strict=True)]


def main() -> int:
    """Parse, run, print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="results file of `grpo-gsm8k eval`")
    parser.add_argument("--model_id", default="", help="model folder or name on the hub")
    parser.add_argument("--base_url", default="", help="a server's OpenAI wire, in place of lm-eval's hf backend")
    parser.add_argument("--served_name", default="", help="the model's name at --base_url; empty for --model_id")
    parser.add_argument("--train", type=Path, help="training problems, for lm-eval's own examples")
    parser.add_argument("--shots", type=int, default=5, help="lm-eval's examples; its gsm8k has 5")
    parser.add_argument("--suite", default="", help="lm-eval tasks by name, separated by commas")
    parser.add_argument("--tasks_dir", default="", help="folder with further task files for --suite")
    parser.add_argument("--baseline", type=Path, help="what --suite wrote before")
    parser.add_argument("--limit", type=int, default=0, help="only so many problems; 0 for all")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="where the JSON goes, besides stdout")
    args = parser.parse_args()
    if bool(args.suite) == bool(args.results) or (args.suite and not args.model_id):
        parser.error("give a results file, or --suite with --model_id")
    worse: list[dict[str, Any]] = []
    if args.suite:
        report = run_suite(args.model_id, args.suite.split(","), args.tasks_dir, args.limit, args.batch_size)
        if args.baseline:
            compared = regressions(read_json(args.baseline), report)
            worse = [row for row in compared if row["significant"] and row["difference"] < 0]
            report |= {"baseline": str(args.baseline), "compared": compared}
    else:
        model = backend(args.model_id, args.batch_size, args.base_url, args.served_name)
        report = against(args.results, args.model_id, args.train, args.shots, args.limit, model)
    if args.out:
        write_json(args.out, report)
    print(json.dumps({key: value for key, value in report.items() if key != "values"}, ensure_ascii=False, indent=1))
    for row in worse:
        say(f"worse than {args.baseline}: {row['task']} {100 * row['difference']:+.1f} points, p = {row['p_holm']:.3g}")
    return 1 if worse else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GrpoError as fault:
        say(f"error: {fault}")
        sys.exit(fault.exit_code)
