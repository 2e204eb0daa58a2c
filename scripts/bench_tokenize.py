"""How fast `tokenize` is, and how much memory it takes, on many pairs.

    python scripts/bench_tokenize.py --model_id MODEL --data DIR/train.jsonl --pairs 20000 80000

The pairs are the questions and solutions of a data file, over and over, each response as many solutions as it takes to
be about 200 tokens long (Qwen's; the demo model's tokenizer needs twice as many). Every run is a process of its own,
which reads its own peak memory and processor time; start and imports are not in the time. Prints a line for each and,
at the end, one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

RUN = """
import json, resource, sys, time
from grpo_gsm8k import config, pretokenize
cfg = config.resolve("tokenize", flags=json.loads(sys.argv[1]))
pretokenize.renderer_of(cfg)
wall, cpu = time.perf_counter(), time.process_time()
said = pretokenize.tokenize(cfg)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mib": peak, **said}))
"""


def pairs(data: Path, response_chars: int) -> Iterator[dict[str, str]]:
    """Questions with responses of at least so many characters."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    solutions = itertools.cycle(row["answer"] for row in rows)
    for row in itertools.cycle(rows):
        response = ""
        while len(response) < response_chars:
            response += next(solutions) + "\n"
        yield {"prompt": row["question"], "response": response}


def measure(flags: dict[str, object]) -> dict[str, float]:
    """One run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(flags)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure each number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20000, 80000])
    parser.add_argument("--response_chars", type=int, default=450)
    flags = parser.parse_args()
    results = []
    for count in flags.pairs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.jsonl"
            with path.open("w", encoding="utf-8") as handle:
                rows = itertools.islice(pairs(flags.data, flags.response_chars), count)
                handle.writelines(json.dumps(row) + "\n" for row in rows)
            given = {"model_id": flags.model_id, "data_path": str(path), "out_dir": str(Path(folder) / "shards")}
            found = measure(given)
        rate = count / found["cpu_s"] * 60
        print(
            f"{count} pairs: {found['wall_s']:.1f} s, {rate:.0f} a minute and core, {found['peak_mib']:.0f} MiB at "
            f"most, {found['tokens'] / found['written']:.0f} tokens a pair, "
            f"{found['trained_tokens'] / found['written']:.0f} in the response, {found['left_out']:.0f} left out",
            file=sys.stderr,
        )
        results.append({"pairs": count, "pairs_per_minute_and_core": rate, **found})
    print(json.dumps({"runs": results}))


if __name__ == "__main__":
    main()
