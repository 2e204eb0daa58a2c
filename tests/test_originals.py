"""docs/originals.md, every row typed: by the real command line, and under --runslow run where the row says so.

`pytest -n 0 -s tests/test_originals.py` prints each row and its exit code.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.core

from grpo_gsm8k import cli, config, data_prep, originals
from grpo_gsm8k.runs.files import write_jsonl
from tests import test_docs
from tests.test_docs import PACKAGE, ROOT
from tests.toys import make_data, make_model

PAGE = ROOT / "docs/originals.md"
PROGRAMS = (
    "grpo-gsm8k",
    "python",
    "uv",
    "scripts/uv",
    "docker",
    "pytest",
    "pre-commit",
    "ruff",
    "mypy",
    "PYTHONPATH=.",
)
KINDS = {"run", "typed", "named", "refused"}


@dataclass(frozen=True)
class Row:
    """A row of the page: the document, what stands there, what to type here, and how that is checked."""

    document: str
    there: str
    here: str
    kind: str

    @property
    def spans(self) -> list[str]:
        """What stands in code type in the second column."""
        return re.findall(r"`([^`]+)`", self.here)

    @property
    def commands(self) -> list[str]:
        """Those of them that are command lines."""
        return [span for span in self.spans if span.split(maxsplit=1)[0] in PROGRAMS]

    def __str__(self) -> str:
        return f"{self.document}: {self.there}".replace("`", "")


def rows() -> Iterator[Row]:
    document = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            document = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and cells[0] not in ("there", "---") and not line.startswith("|---"):
            assert len(cells) == 3 and cells[2] in KINDS, line
            yield Row(document, *cells)


ROWS = list(rows())
every_row = pytest.mark.parametrize("row", ROWS, ids=[f"{n}-{row}"[:70] for n, row in enumerate(ROWS, 1)])


# ------------------------------------------------------------------------------------------------ no row missing

INVENTORY = {
    "grpo-gsm8k": """
        eval data_prep r1_traces pretokenize_r1_pairs prep_val_for_vllm sft fast_eval_vllm one-shot gsm8k_eval
        unified_eval docker --runslow pre-commit ruff mypy uv run_manifest.json requirements.lock.txt data.sha256
        DATA_DIR artifacts/runs/ artifacts/gsm8k/ artifacts/gsm8k_hf_snapshot artifacts/baselines/ artifacts/tokenized/
        val_for_vllm.jsonl --eval_set_path VSCODE_TUNNEL_NAME XDG_CONFIG_HOME XDG_CACHE_HOME VSCODE_AGENT_FOLDER
        UV_PROJECT_ENVIRONMENT HF_HOME PIP_CACHE_DIR GIT_CONFIG_GLOBAL WANDB_MODE WANDB_API_KEY DEEPSEEK_API_KEY
        NVIDIA_TF32_OVERRIDE CUBLAS_WORKSPACE_CONFIG PYTHONHASHSEED TOKENIZERS_PARALLELISM OMP_NUM_THREADS
        seed_everything cli.py data_prep.py fast_eval_vllm.py prompts.py repro.py reward_fn.py Dockerfile entrypoint.sh
        GPUs OOM downloads revision offline Module""",
    "Podsmith": """
        --repo-id --gpu-count --sft --gpu-type --image --skip-setup --report-to --debug-remote --dry-run --no-vllm
        --shard-model --deepspeed-stage --attn-implementation --volume-gb --container-disk-gb --max-steps
        --dataset-fraction --dataset-seed --chat-template --reasoning-tag --reasoning-end-tag --answer-tag
        --answer-end-tag --transformers-version --transformers-from-git --env-file --use-thinnka-image QLoRA gated
        memory L40S public trainer hub token webhook setup train Discord accuracy failure RUNPOD_API_KEY HF_TOKEN
        HUGGINGFACE_HUB_TOKEN SSH_PUBLIC_KEY RUNPOD_SSH_PUBLIC_KEY SSH_PRIVATE_KEY_PATH PROGRESS_WEBHOOK_URL
        DISCORD_WEBHOOK_URL WANDB_API_KEY example.env requirements.txt docker""",
    "GRPO with Tinker": """
        smoke small full --model_name --base_url --lora_rank --n_grpo_steps --learning_rate --rollout_batch_size
        --group_size --advantage_eps --use_std_normalization --cliprange --sampling_temperature --sampling_max_tokens
        --use_r1_zero_format --log_path --save_every --eval_every --wandb_project --wandb_name TINKER_API_KEY resumes
        progress/grpo_step progress/done_frac reward/mean reward/std reward/min reward/max val/accuracy
        val/format_accuracy time/save_weights time/sampling time/compute_rewards time/build_data time/training
        time/total checkpoints ImportError mismatch rewards memory sampling validation""",
    "The post-training pipeline": """
        validate quick full tiny custom sft rl deploy --sft-checkpoint --checkpoint --data merge upload_to_hf
        modal_app.py modal_client.py messages dataset_type model_name learning_rate batch_size num_epochs max_length
        lora_rank lora_alpha lora_dropout LAST_ASSISTANT_MESSAGE save_every eval_every log_path importance_sampling ppo
        group_size groups_per_batch length_preference target_length reward_model max_tokens temperature top_p num_steps
        kl_penalty_coef num_substeps TINKER_TOKEN HF_TOKEN WANDB_API_KEY MODAL_TOKEN_ID MODAL_TOKEN_SECRET .env.example
        out low deployment JSONL""",
    "grpo_server": """
        uvicorn_main --api_key --output_dir alphabetical.py /start /stop /status /completions /rewards /model api-key
        model_version learning_rate num_completions_per_prompt max_completion_length max_steps PEFT""",
}


def test_no_row_is_missing():
    assert [row.document for row in ROWS if row.document not in INVENTORY] == []
    for document, names in INVENTORY.items():
        there = " ".join(row.there for row in ROWS if row.document == document)
        assert [name for name in names.split() if name not in there] == [], document


def test_every_other_name_of_a_flag_has_a_row():
    there = " ".join(row.there + row.here for row in ROWS).replace("-", "_")
    spelled = [*(f"--{name}" for name in originals.ALIASES if not name.startswith("no-")), *originals.RENAMED]
    missing = [name for name in spelled if name.removeprefix("--").replace("-", "_") not in there]
    assert missing == []


# ---------------------------------------------------------------------------------------------------- typing it


def typed(line: str, capsys: Any) -> int:
    """Type a command line; its exit code, or a failed assertion.

    Commands of this project are parsed by the real command line with --help, and the checks of their settings are made.
    """
    words = shlex.split(line)
    while "=" in words[0] and not words[0].startswith("-"):
        words.pop(0)
    if words[0] == "docker":
        assert words[1] in ("build", "buildx", "run"), line
        return typed(shlex.join(words[words.index("grpo-gsm8k") + 1 :]), capsys) if words[1] == "run" else 0
    if words[0] == "python" and words[1] == "-c":
        compile(words[2], line, "exec")
        return 0
    if words[0] == "python" and words[1] == "scripts/grpo_train_tinker.py":
        words = ["grpo-gsm8k", *translate(words[2:])]
    elif words[0] == "python" and words[1] == "scripts/runpod_launch.py":
        words = ["grpo-gsm8k", "launch", "up", *words[2:]]
    elif words[0] == "python" and words[1].startswith("scripts/shell/"):
        words = ["grpo-gsm8k", "tokenize" if "pretokenize" in words[1] else "prep-eval", *words[2:]]
    elif words[:2] == ["python", "-m"] and words[2] == "grpo_gsm8k.cli":
        words = ["grpo-gsm8k", *words[3:]]
    elif words[:3] == ["python", "-m", "grpo_gsm8k.fast_eval_vllm"]:
        words = ["grpo-gsm8k", "eval", *words[3:]]
    if words[0] != "grpo-gsm8k":
        test_docs.check(words)
        return 0
    code = exit_code([*before_the_job(words[1:]), "--help"], capsys)
    if code == 0:
        test_docs.check_cli(words[1:])
    return code


def before_the_job(words: Sequence[str]) -> list[str]:
    return list(words[: words.index("--")]) if "--" in words else list(words)


def exit_code(words: Sequence[str], capsys: Any) -> int:
    """Of the command line, in this process."""
    try:
        cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        capsys.readouterr()
    return 0


@functools.cache
def translator() -> Any:
    return test_docs.runpy.run_path(str(ROOT / "scripts/grpo_train_tinker.py"))["translated"]


def translate(words: Sequence[str]) -> list[str]:
    found: list[str] = translator()(words)
    return found


@pytest.fixture
def show(request, capsys):
    """Print a row and its exit code, under -s."""

    def tell(row: Row, what: str, code: object) -> None:
        if request.config.getoption("capture") == "no":
            with capsys.disabled():
                print(f"{code!s:>6}  {row}  →  {what}")

    return tell


def is_there(words: Sequence[str]) -> bool:
    """Whether the command and its options exist in this version."""
    command = cli.app.tree.commands.get(words[1])
    known = {option.replace("_", "-") for parameter in getattr(command, "params", ()) for option in parameter.opts}
    return (
        command is not None
        and {word.partition("=")[0].replace("_", "-") for word in words if word[:2] == "--"} <= known
    )


@pytest.fixture
def plain(monkeypatch):
    """Help without panels, which take longer to draw than all the rest."""
    monkeypatch.setattr(typer.core, "HAS_RICH", False)


@every_row
def test_row(row, plain, show, capsys):
    for line in row.commands:
        code = typed(line, capsys) if row.kind != "refused" else exit_code(shlex.split(line)[1:], capsys)
        show(row, line, code)
        assert code == (2 if row.kind == "refused" else 0), line
    others = [span for span in row.spans if span not in row.commands]
    for span in others:
        named(span)
        show(row, span, "named")
    assert row.commands or others or "the same" in row.here, f"{row}: nothing to check"


KEYS = "prompt response reward gold input_ids labels response_mask pad_token_id meta gold_num step accuracy cost tail"


def named(span: str) -> None:
    """Assert that a flag, variable, file or metric is there."""
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
        assert flag.replace("_", "-") in test_docs.all_flags(), f"no command has {flag}"
    if span.startswith("--"):
        return
    source = test_docs.package_source()
    if re.fullmatch(r"[A-Z][A-Z0-9_]+", span):
        everywhere = source + "".join(
            (ROOT / name).read_text() for name in ("entrypoint.sh", "Dockerfile", ".env.example")
        )
        assert span in everywhere, f"nothing reads {span}"
    elif re.fullmatch(r"[a-z]+/[a-z_]+", span) and not (ROOT / span).exists():
        assert f'"{span}"' in source or f"{span.partition('/')[2]}" in source, f"nothing logs {span}"
    elif span.startswith("/v1/"):
        assert f'"{span.removeprefix("/v1")}"' in source, f"nothing answers {span}"
    elif span in KEYS.split():
        assert f'"{span}"' in source or f"{span}=" in source, f"nothing writes {span}"
    elif re.search(r"\.\w+$|/", span) and not (ROOT / span).exists() and not (PACKAGE / span).exists():
        assert Path(span).name in source or f'"{Path(span).stem}' in source, f"{span} is nowhere"


def test_links_lead_on():
    test_docs.test_relative_links_resolve(PAGE)


def test_chat_presets_are_the_pipelines():
    sizes = {"tiny": (8, 1, 10), "quick": (32, 1, 100), "full": (64, 3, 500)}
    for preset, (batch, epochs, steps) in sizes.items():
        sft, grpo = (config.resolve(stage, preset=preset, task="chat") for stage in ("sft", "grpo"))
        assert (sft.batch_size, sft.epochs, grpo.steps) == (batch, epochs, steps), preset


# ---------------------------------------------------------------------------------------------------- running it

LESS = {
    "pipeline": ["--set", "toy.train=64", "--set", "toy.val=8", "--set", "toy.test=8", "--max_steps", "2"],
    "eval": ["--limit", "2", "--max_new_tokens", "4", "--device", "cpu"],
    "sft": ["--max_steps", "2", "--max_new_tokens", "4", "--batch_size", "2", "--device", "cpu"],
    "data_prep": ["--source", "source"],
    "grpo_train_tinker.py": [
        "--sampling_max_tokens=4",
        "--max_steps=2",
        "--lora_rank=2",
        "--device=cpu",
        "--log_path=log",
    ],
}
"""What a command is given besides, so that it ends in seconds on this machine."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where the rows are run, one after the other: a tiny model, and toy data in GSM8K's form instead of the hub."""
    folder = tmp_path_factory.mktemp("desk")
    toy = make_data(folder / "toy", train=40, val=4, test=8)
    make_model(folder / "model", toy)
    for split, copies in (("train", 14), ("test", 1)):  # 512 problems are reserved
        lines = [json.loads(line) for line in (toy / f"{split}.jsonl").read_text().splitlines()]
        bare = [{"question": f"({n}) {r['question']}", "answer": r["answer"]} for n in range(copies) for r in lines]
        write_jsonl(folder / "source" / f"{split}.jsonl", bare)
    data_prep.prepare(folder / "artifacts/gsm8k", folder / "source")
    pairs = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    write_jsonl(folder / "artifacts/r1_sft_pairs.jsonl", pairs)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def with_stand_ins(line: str) -> list[str]:
    """The command as a process of this Python: the tiny model for every other, no GPU, a folder for the hub."""
    line = re.sub(r"Qwen/[\w.-]+", "model", line).replace(" --vllm_device cuda:1", "").replace('"hub"', '"source"')
    words = shlex.split(line)
    words = (
        [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", "grpo_gsm8k.cli", *words[1:]]
    )
    name = words[3] if words[2] == "grpo_gsm8k.cli" else words[2] if words[1] == "-m" else words[1]
    name = {"fast_eval_vllm": "eval"}.get(found := name.rpartition("/")[2].removeprefix("grpo_gsm8k."), found)
    model = {"eval": ["--model_id", "model"], "grpo_train_tinker.py": ["--model_name=model"]}.get(name, [])
    return [*words, *model, *LESS.get(name, [])]


@pytest.mark.slow
def test_the_rows_that_are_run(desk, show):
    """In the order of the page: what one row writes, a later one reads."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    count = 0
    for row in ROWS:
        for line in row.commands if row.kind == "run" else ():
            words = with_stand_ins(line)
            ran = subprocess.run(words, cwd=desk, env=env, capture_output=True, text=True, check=False)
            show(row, line, ran.returncode)
            assert ran.returncode == 0, (words, ran.stderr)
            count += 1
    assert count >= 12
    made = {path.relative_to(desk / "artifacts").as_posix() for path in (desk / "artifacts").rglob("*")}
    assert made >= {"tokenized/val_for_vllm.jsonl", "tokenized/shard_00000.pt", "gsm8k_hf_snapshot/train.jsonl"}
    baseline = (desk / "artifacts/baselines/qwen25_7b_eval.jsonl").read_text().splitlines()
    assert json.loads(baseline[0]).keys() >= {"prompt", "response", "reward", "gold"}
    steps = [json.loads(line) for line in (desk / "log/metrics.jsonl").read_text().splitlines()]
    spans = [span for row in ROWS if row.kind == "run" for span in row.spans]
    metrics = {span for span in spans if re.fullmatch("(progress|reward|val|time)/[a-z_]+", span)}
    assert len(metrics) >= 14 and metrics <= set().union(*steps)
