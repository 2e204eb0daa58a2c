"""`grpo-gsm8k grpo` under the names and with the defaults of the script that trained GRPO on Tinker's servers.

    python scripts/grpo_train_tinker.py --n_grpo_steps=5 --rollout_batch_size=8 --group_size=2 --save_every=2

With `--base_url`, or with TINKER_API_KEY in the environment, a training service trains and samples; without either it
is this machine, and so it is with `--learner=torch`. `--rollout_batch_size` counts questions, each of which is answered
`--group_size` times; validation asks 100 test problems, drawn by the seed; the run in `--log_path` is continued if
there is one. GSM8K is fetched where no `--data` is named and none is there. Every other flag is `grpo`'s own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_gsm8k import config
from grpo_gsm8k.cli import main

DEFAULTS = {
    "model_name": "Qwen/Qwen3-8B",
    "lora_rank": "32",
    "n_grpo_steps": "200",
    "learning_rate": "1e-5",
    "rollout_batch_size": "256",
    "group_size": "8",
    "advantage_eps": "1e-6",
    "use_std_normalization": "True",
    "cliprange": "0.2",
    "sampling_temperature": "1.0",
    "sampling_max_tokens": "1024",
    "use_r1_zero_format": "True",
    "log_path": "/tmp/grpo-tinker",
    "save_every": "20",
    "eval_every": "20",
}


def translated(argv: Sequence[str]) -> list[str]:
    """The command line of `grpo` that does what these flags say. Raises `SystemExit` for a value that is none."""
    given, others = dict(DEFAULTS), list[str]()
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in DEFAULTS:
            others.append(word)
        else:
            given[name] = value if equals else next(words, "")
    questions, group = (whole(given.pop(name), name) for name in ("rollout_batch_size", "group_size"))
    style = "r1_zero" if truth(given.pop("use_r1_zero_format"), "use_r1_zero_format") else "qwen_boxed"
    norm = "--std-norm" if truth(given.pop("use_std_normalization"), "use_std_normalization") else "--no-std-norm"
    made = [f"--rollouts_per_step={questions * group}", f"--group_size={group}", norm, f"--prompt_style={style}"]
    flags = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in others}
    if "learner" not in flags and ("base_url" in flags or os.environ.get("TINKER_API_KEY")):
        made.append("--learner=tinker")
    made += ["--eval_examples=100", "--eval_draw=random", f"--eval_set_path={data_of(others)}/test.jsonl", "--resume"]
    return ["grpo", *(f"--{name}={value}" for name, value in given.items()), *made, *others]


def data_of(others: Sequence[str]) -> str:
    """The folder of the data: named by `--data`, or the usual one."""
    for word, after in zip(others, [*others[1:], ""], strict=False):
        if word.partition("=")[0] == "--data":
            return word.partition("=")[2] or after
    return config.DATA if Path(config.DATA).exists() else config.OTHER_DATA


def whole(text: str, name: str) -> int:
    """A whole number."""
    if not text.isdecimal():
        sys.exit(mistake(name, text, "must be a whole number"))
    return int(text)


def truth(text: str, name: str) -> bool:
    """True or False."""
    if text.lower() not in ("true", "false"):
        sys.exit(mistake(name, text, "must be True or False"))
    return text.lower() == "true"


def mistake(name: str, text: str, why: str) -> int:
    """Print the line of a user's mistake, and return its exit code."""
    print(f"error: --{name} {text}: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    command = translated(sys.argv[1:])
    if "--help" not in command and not Path(data_of(command)).exists():
        main(["data", f"--out_dir={data_of(command)}"])
    main(command)
