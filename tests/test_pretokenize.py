"""The prepared evaluation set: what one model sees, used by that model alone, and never rendered twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from grpo_gsm8k import config, fast_eval_vllm, pretokenize, sft
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.files import write_jsonl
from grpo_gsm8k.tasks import load_task
from tests.toys import REPOSITORY, cli, load_problems, make_model, stage_config


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(tiny, out, **flags):
    given = {"model_id": str(tiny.model), "data": str(tiny.data), "prompt_style": "gsm8k", "out": str(out), **flags}
    return pretokenize.run(config.resolve("prep-eval", flags=given))


def answers(model, path, out, **flags):
    """The results of an evaluation: a row a completion."""
    given = {"model_id": str(model), "eval_path": str(path), "out_dir": str(out), "run_name": path.stem}
    given |= {"device": "cpu", "prompt_style": "gsm8k", "max_new_tokens": 12}
    fast_eval_vllm.run(config.resolve("eval", flags={**given, **flags}))
    return rows_of(out / f"{path.stem}.jsonl")


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """The validation problems, prepared by the real command, and what it printed."""
    out = tmp_path_factory.mktemp("prepared") / "val_set.jsonl"
    done = cli(
        *("prep-eval", "--model-id", tiny.model, "--data", tiny.data, "--split", "val", "--prompt_style", "gsm8k"),
        *("--out", out, "--json"),
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_rows_of_the_real_command_against_transformers(tiny, prepared):
    out, said = prepared
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    problems, rows = rows_of(tiny.data / "val.jsonl"), rows_of(out)
    assert (said["written"], said["path"], len(rows)) == (12, str(out), 12)
    for problem, row in zip(problems, rows, strict=True):
        chat = [{"role": "user", "content": problem["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert row["prompt_token_ids"] == ids
        assert row["prompt"] == f"<|im_start|>user\n{problem['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert {key: row[key] for key in ("id", "question", "answer", "gold")} == problem
        assert row["gold_num"] == int(problem["answer"].rpartition("#### ")[2])
        assert row["rendered"]["prompt_style"] == "gsm8k"
    assert said["longest_prompt"] == max(len(row["prompt_token_ids"]) for row in rows)


def test_the_set_gives_the_records_that_the_problems_give(tiny, prepared, tmp_path):
    flags = {"samples": 2, "temperature": 1.0}
    raw = answers(tiny.model, tiny.data / "val.jsonl", tmp_path, **flags)
    assert answers(tiny.model, prepared[0], tmp_path, **flags) == raw
    assert len(raw) == 24 and len({row["response"] for row in raw}) > 12


def test_training_validates_on_the_set(tiny, prepared, tmp_path):
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "max_steps": 1, "batch_size": 4, "eval_every": 1}
    sft.run(stage_config("sft", **flags, out_dir=str(tmp_path / "a"), eval_set_path=str(prepared[0])))
    sft.run(stage_config("sft", **flags, out_dir=str(tmp_path / "b")))
    both = [rows_of(tmp_path / name / "evals/step_000001.jsonl") for name in ("a", "b")]
    assert both[0] == both[1] and len(both[0]) == 4


def test_another_style_is_refused_by_name(tiny, prepared, tmp_path):
    with pytest.raises(DataError, match=r"prompt_style: 'gsm8k' then, 'qwen_boxed' now.*prep-eval") as caught:
        answers(tiny.model, prepared[0], tmp_path, prompt_style="qwen_boxed")
    assert (caught.value.path, caught.value.line) == (prepared[0], 1)
    prepare(tiny, tmp_path / "tags.jsonl", prompt_style="r1_zero", answer_open="[a]", answer_close="[/a]")
    with pytest.raises(DataError, match=r"\(answer_open: '\[a\]' then, '<answer>' now; answer_close: [^;]*\)"):
        answers(tiny.model, tmp_path / "tags.jsonl", tmp_path, prompt_style="r1_zero")


def test_another_tokenizer_or_template_is_refused(tiny, prepared, tmp_path):
    other = make_model(tmp_path / "other", tiny.data, vocab_size=400)
    with pytest.raises(DataError, match=r"val_set\.jsonl:1: .*\(tokenizer: '\w{16}' then, '\w{16}' now\)"):
        answers(other, prepared[0], tmp_path)
    shutil.copytree(tiny.model, tmp_path / "template")
    template = tmp_path / "template/chat_template.jinja"
    template.write_text(template.read_text().replace("message['role']", "message['role'] + '!'"))
    with pytest.raises(DataError, match=r"\(tokenizer: '\w{16}' then, '\w{16}' now\)"):
        answers(tmp_path / "template", prepared[0], tmp_path)


def test_other_weights_with_the_same_tokenizer_are_welcome(tiny, prepared, tmp_path):
    flags = {"model_id": str(tiny.model), "data": str(tiny.data), "max_steps": 1, "batch_size": 4, "eval_every": 1000}
    trained = sft.run(stage_config("sft", **flags, out_dir=str(tmp_path / "run")))["model"]
    assert len(answers(trained, prepared[0], tmp_path, prompt_style="auto")) == 12


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("prompt_token_ids", lambda ids: [*ids[:-1], ids[-1] + 1]),
        ("question", lambda text: text + " "),
        ("prompt", lambda text: text + "Let us think. "),
    ],
)
def test_a_row_that_was_changed_is_refused_with_its_line(tiny, prepared, tmp_path, key, change):
    rows = rows_of(prepared[0])
    rows[2][key] = change(rows[2][key])
    path = write(tmp_path / "changed.jsonl", *rows)
    with pytest.raises(DataError, match=r"changed\.jsonl:3: the prompt has been changed since"):
        answers(tiny.model, path, tmp_path)
    assert len(answers(tiny.model, path, tmp_path, limit=2)) == 2


def test_a_set_can_be_made_again_from_a_set(tiny, prepared, tmp_path):
    again = prepare(tiny, tmp_path / "again.jsonl", eval_path=str(prepared[0]), prompt_style="qwen_boxed", limit=5)
    fresh = prepare(tiny, tmp_path / "fresh.jsonl", prompt_style="qwen_boxed", limit=5)
    assert again["written"] == fresh["written"] == 5
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()


def test_a_prompt_that_was_rendered_elsewhere_is_not_rendered_again(tiny, tmp_path):
    good = {"prompt": "1+1?", "gold": "2"}
    for bad in ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "2+2?<|endoftext|>"):
        path = write(tmp_path / "hand.jsonl", good, {"prompt": bad, "gold": "4"})
        with pytest.raises(DataError, match=r"hand\.jsonl:2: the question holds <\|.*rendered twice"):
            answers(tiny.model, path, tmp_path)
        with pytest.raises(DataError, match=r"hand\.jsonl:2: the question holds"):
            prepare(tiny, tmp_path / "out.jsonl", eval_path=str(path))
    row = answers(tiny.model, write(tmp_path / "hand.jsonl", good), tmp_path)[0]
    assert row["prompt"].count("1+1?") == row["prompt"].count("<|im_start|>user") == 1


def test_rows_made_by_hand_can_be_prepared(tiny, tmp_path):
    path = write(tmp_path / "hand.jsonl", {"id": "a", "prompt": "Half of 5?", "gold": "2.5"})
    prepare(tiny, tmp_path / "out.jsonl", eval_path=str(path))
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert (row["id"], row["question"], row["gold"], row["gold_num"]) == ("a", "Half of 5?", "2.5", 2.5)
    assert [r["id"] for r in answers(tiny.model, tmp_path / "out.jsonl", tmp_path / "results")] == ["a"]


def test_it_does_not_write_over_the_problems(tiny, tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "gold": "2"})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="--out"):
        prepare(tiny, tmp_path / "." / "p.jsonl", eval_path=str(path))
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"nowhere: does not exist; make it with `grpo-gsm8k data"):
        prepare(tiny, tmp_path / "out.jsonl", data=str(tmp_path / "nowhere"))


def test_the_first_readmes_command(tiny, prepared, tmp_path):
    script = REPOSITORY / "scripts/shell/prep_val_for_vllm.py"
    flags = ["--infile", tiny.data / "val.jsonl", "--model_id", tiny.model, "--prompt_style", "gsm8k"]
    command = [sys.executable, script, *flags]
    done = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifacts/tokenized/val_for_vllm.jsonl").read_bytes() == prepared[0].read_bytes()
    command += ["--outfile", tiny.data / "val.jsonl"]
    done = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_where_a_problem_was_read_is_no_part_of_the_data(prepared, tmp_path):
    task = load_task("gsm8k")
    rows = [task.row(problem) for problem in load_problems(prepared[0])[:3]]
    assert rows[0].keys() == {"id", "question", "answer", "gold", "gold_num"}
    for name in ("bare", "again"):
        write_jsonl(tmp_path / name, rows)
    assert load_problems(tmp_path / "bare") == load_problems(tmp_path / "again") == load_problems(prepared[0])[:3]
