"""`compare` on files, the k-shot and seeded evaluation that makes them, and what the tables show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from transformers import AutoTokenizer

from grpo_gsm8k import config, fast_eval_vllm
from grpo_gsm8k.cli import main
from grpo_gsm8k.errors import ConfigError, DataError, UserError
from grpo_gsm8k.evals.compare import compare_files
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.render import SHOT_BREAK
from tests.toys import load_problems, renderer_for, word_problem


def results(path: Path, verdicts: dict[str, list[bool]], **changed: Any) -> Path:
    """A results file with these verdicts."""
    rows = [
        {"id": key, "question": f"what is {key}?", "gold": "7", "extracted": "7" if right else "8", "correct": right}
        | {"sample": i, **changed}
        for key, own in verdicts.items()
        for i, right in enumerate(own)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def single(right: str) -> dict[str, list[bool]]:
    return {f"p{i:02}": [letter == "1"] for i, letter in enumerate(right)}


def test_two_files_and_their_flips(tmp_path):
    a = results(tmp_path / "a.jsonl", single("1111100000000000"))
    b = results(tmp_path / "b.jsonl", single("0111111111110000"))
    found = compare_files([a, b], examples=2)
    assert found["difference"] == pytest.approx(6 / 16) and (found["won"], found["lost"], found["n"]) == (7, 1, 16)
    assert found["p_value"] == pytest.approx(mcnemar([[4, 1], [7, 4]], exact=True).pvalue)
    flips = found["examples"]
    assert [row["flip"] for row in flips] == ["won", "won", "lost"] and flips[2]["id"] == "p00"
    assert flips[0]["extracted_a"] == ["8"] and flips[0]["extracted_b"] == ["7"]
    assert found.keys() >= {"difference", "ci95", "p_value", "n"} and set(found["needed"]) == {"0.01", "0.02", "0.05"}


def test_several_completions_count_by_their_mean(tmp_path):
    a = results(tmp_path / "a.jsonl", {"p": [True, False, False, False], "q": [True] * 4})
    b = results(tmp_path / "b.jsonl", {"p": [True, True], "q": [True, False]})
    found = compare_files([a, b])
    assert found["accuracy_a"] == pytest.approx(0.625) and found["accuracy_b"] == pytest.approx(0.75)
    assert (found["won"], found["lost"]) == (1, 1)
    # Differences +3/4 and -1/2; sums of the four signings: 5/4, 1/4, -1/4, -5/4. All are at least 1/4 from 0.
    assert found["p_value"] == 1.0 and found["p_mid"] == pytest.approx(0.75)


def test_more_than_two_runs_are_corrected_for_their_number(tmp_path):
    files = [
        results(tmp_path / f"{name}.jsonl", single(right))
        for name, right in (("a", "0" * 12), ("b", "1" * 6 + "0" * 6), ("c", "1" * 5 + "0" * 7), ("d", "1" + "0" * 11))
    ]
    found = compare_files(files)
    rows = found["comparisons"]
    assert [Path(row["b"]).stem for row in rows] == ["b", "c", "d"] and found["n"] == 12
    expected = multipletests([row["p_mid"] for row in rows], method="holm")
    assert [row["p_holm"] for row in rows] == pytest.approx(expected[1])
    # c is below 5 % by itself (2 of 2^5 signings, half counted), and no longer among three.
    assert [row["significant"] for row in rows] == list(expected[0]) == [True, False, False]
    assert rows[1]["p_mid"] < 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "another"}, "'p00' is another problem there"),
        ({"gold": "9"}, "'p00' is another problem there"),
    ],
)
def test_other_problems_under_the_same_ids_are_refused(tmp_path, change, said):
    a, b = results(tmp_path / "a.jsonl", single("10")), results(tmp_path / "b.jsonl", single("10"), **change)
    with pytest.raises(UserError, match=said) as fault:
        compare_files([a, b])
    assert "b.jsonl" in str(fault.value)
    with pytest.raises(UserError, match="two results files or more"):
        compare_files([a])
    (tmp_path / "c.jsonl").write_text('{"id": "p00"}\n')
    with pytest.raises(DataError, match=r"c.jsonl:1: not a result"):
        compare_files([a, tmp_path / "c.jsonl"])


def test_tables_on_a_pipe(tmp_path, capsys):
    a = results(tmp_path / "a.jsonl", single("1111100000000000"))
    b = results(tmp_path / "b.jsonl", single("0111111111110000"))
    main_ok(["compare", str(a), str(b), "--gain", "5"])
    out = capsys.readouterr().out
    assert "31.2 %" in out and "+37.5" in out and "16 problems, paired" in out and "what is p00?" in out
    assert "better" not in out.split("p mid")[0] and "for +5.0" in out
    main_ok(["compare", str(a), str(b), str(a), "--json"])
    assert len(json.loads(capsys.readouterr().out)["comparisons"]) == 2


def main_ok(argv: list[str]) -> None:
    try:
        main(argv)
    except SystemExit as stop:
        assert not stop.code, stop.code


# ------------------------------------------------------------------------------------------------ evaluation

SHOTS = [
    word_problem("s1", "Ann has 1 egg. How many?", "She has 1.\n#### 1", "1"),
    word_problem("s2", "Ben has 2 eggs. How many?", "He has 2.\n#### 2", "2"),
]
ASKED = word_problem("p", "Eva has 3 eggs. How many?", "She has 3.\n#### 3", "3")


def test_shots_are_earlier_turns_of_the_chat(tiny):
    renderer = renderer_for(AutoTokenizer.from_pretrained(tiny.model), "qwen_boxed", shots=SHOTS)
    text = renderer.spell(renderer.prompt(ASKED).token_ids)
    assert text.count("Please reason step by step") == 1
    turns = [turn.partition("\n") for turn in text.split("<|im_start|>")[1:]]
    roles, said = [role for role, _, _ in turns], [body.removesuffix("<|im_end|>\n") for _, _, body in turns]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert said[1] == SHOTS[0].text and said[2] == "She has 1.\n\nThe final answer is $\\boxed{1}$."
    assert said[5] == ASKED.text and said[6] == "" and renderer.stop == ()
    # A shot is rendered as the same problem is for training: its ids are part of the prompt.
    bare = renderer_for(renderer.tokenizer, "qwen_boxed")
    example = bare.target(SHOTS[0]).token_ids
    assert renderer.prompt(ASKED).token_ids[: len(example)] == example


def test_shots_of_a_model_without_turns_are_text_and_stop_before_the_next(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = None
    renderer = renderer_for(tokenizer, "gsm8k", shots=SHOTS)
    text = renderer.spell(renderer.prompt(ASKED).token_ids)
    first, second, last = text.split(SHOT_BREAK)
    assert first == "Ann has 1 egg. How many?\n\nAnswer: She has 1.\n#### 1"
    assert last == "Eva has 3 eggs. How many?\n\nAnswer: " and second.endswith("#### 2")
    assert renderer.stop == (SHOT_BREAK,) and renderer_for(tokenizer, "gsm8k").stop == ()
    tagged = renderer_for(tokenizer, "r1_zero", shots=SHOTS)
    assert tagged.stop == ("</answer>", SHOT_BREAK)
    assert tagged.spell(tagged.prompt(ASKED).token_ids).count("<answer> 1 </answer>") == 1


def eval_config(tiny, tmp_path, **flags):
    base = {"model_id": str(tiny.model), "eval_path": str(tiny.data / "test.jsonl"), "out_dir": str(tmp_path)}
    base |= {"prompt_style": "gsm8k", "max_new_tokens": 6, "device": "cpu", "limit": 3, "run_name": "r"}
    return config.resolve("eval", flags={**base, **flags})


def test_shots_come_from_the_named_file_and_never_from_the_evaluated_one(tiny, tmp_path):
    train, test = tiny.data / "train.jsonl", tiny.data / "test.jsonl"
    mixed = tmp_path / "mixed.jsonl"
    lines = [*test.read_text().splitlines(), *train.read_text().splitlines()[:2]]
    mixed.write_text("".join(json.dumps({**json.loads(line), "id": f"m{i}"}) + "\n" for i, line in enumerate(lines)))
    evaluated = load_problems(test)
    drawn = fast_eval_vllm.draw_shots(eval_config(tiny, tmp_path, shots=2, shots_path=str(mixed)), load_task("gsm8k"), evaluated)
    assert {shot.id for shot in drawn} == {"m16", "m17"}  # the two that are not evaluated
    for flags, said in (
        ({"shots_path": str(test)}, "has 0 problems that are not evaluated"),
        ({"shots_path": str(mixed), "shots": 3}, "has 2 problems"),
        ({}, "--shots needs --shots_path"),
    ):
        with pytest.raises(ConfigError, match=said):
            fast_eval_vllm.draw_shots(eval_config(tiny, tmp_path, **{"shots": 2, **flags}), load_task("gsm8k"), evaluated)
    result = fast_eval_vllm.run(eval_config(tiny, tmp_path, shots=1, shots_path=str(train)))
    rows = [json.loads(line) for line in Path(result["results_path"]).read_text().splitlines()]
    shown = {row["prompt"].split("<|im_end|>")[0] for row in rows}
    assert len(shown) == 1 and all(row["prompt"].count("<|im_start|>user") == 2 for row in rows)
    assert shown.pop().removeprefix("<|im_start|>user\n") in {p.text for p in load_problems(train)}


def test_seeds_are_runs_of_their_own(tiny, tmp_path, capsys):
    flags = {"temperature": 1.0, "samples": 2}
    both = fast_eval_vllm.run(eval_config(tiny, tmp_path, **flags, seeds="3, 5"))
    rows = [json.loads(line) for line in Path(both["results_path"]).read_text().splitlines()]
    assert [(row["seed"], row["sample"]) for row in rows if row["id"] == rows[0]["id"]] == [
        (3, 0),
        (3, 1),
        (5, 0),
        (5, 1),
    ]
    assert len({tuple(row["response"] for row in rows if row["seed"] == seed) for seed in (3, 5)}) == 2
    alone = fast_eval_vllm.run(eval_config(tiny, tmp_path, **flags, seed=5))
    again = [json.loads(line) for line in Path(alone["results_path"]).read_text().splitlines()]
    assert [row["response"] for row in again] == [row["response"] for row in rows if row["seed"] == 5]
    assert set(both["by_seed"]) == {"3", "5"} and both["spread"]["seeds"] is not None and both["n"] == 3
    assert sum(part["n"] for part in both["by_length"]) == 12 and set(both["maj_at_k"]) == {"1", "2"}
    from grpo_gsm8k.evals.tables import print_eval

    print_eval(both)
    out = capsys.readouterr().out
    assert "2 x 2 at temperature 1" in out and "pass@2" in out and "seen between the seeds" in out
    for wrong in ("1,1", "a", "1,,2"):
        with pytest.raises(ConfigError, match="different whole numbers"):
            fast_eval_vllm.run(eval_config(tiny, tmp_path, **flags, seeds=wrong))
    with pytest.raises(ConfigError, match="greedy completions are all the same"):
        fast_eval_vllm.run(eval_config(tiny, tmp_path, seeds="1,2"))
