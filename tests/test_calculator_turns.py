"""The calculator's turns: what is trained on a teacher's solution is, id for id, what sampling it would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grpo_gsm8k.datatypes import Completion, Request, SamplingParams
from grpo_gsm8k.engines.trajectories import sample_trajectories
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import TaskOptions
from grpo_gsm8k.tasks.calculator import MAX_CALLS, Gsm8kCalculator
from grpo_gsm8k.tasks.render import Renderer
from grpo_gsm8k.trainer.tiny_model import make_tiny_model

ROW = {
    "question": "Tom has 12 eggs, finds 5 and doubles them. How many has he?",
    "answer": "Tom has 12+5 = <<12+5=17>>17.\nThen 17*2=<<17*2=34>>34 in all.\n#### 34",
}
TEXT = "Tom has <<12+5>>17 eggs. You have a calculator: write <<48/2>> and the value of 48/2 follows at once."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tiny_model(
        tmp_path_factory.mktemp("calculator") / "m", [TEXT] * 9, 0, vocab_size=400, hidden_size=16, layers=1, heads=2
    )
    return AutoTokenizer.from_pretrained(folder)


class Script:
    """A sampler that writes the given turns, one after the other, whatever it is asked."""

    busy_s = 0.0

    def __init__(self, tokenizer: Any, turns: Sequence[str]) -> None:
        self.tokenizer, self.turns = tokenizer, iter(turns)
        self.asked: list[Request] = []

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        self.asked += requests
        return [[self.completion(next(self.turns), seed) for seed in request.seeds] for request in requests]

    def completion(self, turn: str, seed: int) -> Completion:
        ids = tuple(self.tokenizer(turn, add_special_tokens=False)["input_ids"])
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids, (-0.5,) * len(ids), text, "stop", 0, seed)

    def load(self, *args: Any) -> None:
        raise AssertionError("no weights")


def rendered(tokenizer: Any, style: str) -> tuple[Renderer, Gsm8kCalculator, Any]:
    task = load_task("gsm8k_calculator", TaskOptions(prompt_style=style))
    assert isinstance(task, Gsm8kCalculator)
    return Renderer(tokenizer, task), task, task.example(ROW)


@pytest.mark.parametrize("style", ["gsm8k", "qwen_boxed", "r1_zero"])
def test_a_trained_row_is_what_sampling_the_solution_gives(style: str, tokenizer: Any) -> None:
    renderer, task, example = rendered(tokenizer, style)
    row, prompt = renderer.target(example), renderer.prompt(example)
    n = len(prompt.token_ids)
    assert row.token_ids[:n] == prompt.token_ids and not any(row.mask[:n])
    added = [renderer.spell([i]) for i, trained in zip(row.token_ids[n:], row.mask[n:], strict=True) if not trained]
    assert added == ["1", "7", "3", "4"]  # what the calculator said

    said = [text for author, text in task.target_turns(example) if author == "model"]
    sampler = Script(tokenizer, [*said[:-1], said[-1] + renderer.spell([renderer.end_id])])
    ((trajectory,),) = sample_trajectories(sampler, renderer, [prompt], SamplingParams(stop=renderer.stop), context=512)
    assert trajectory.token_ids == row.token_ids[n:] and trajectory.mask == row.mask[n:]
    assert (trajectory.turns, trajectory.finish_reason) == (3, "stop")
    assert trajectory.logprobs == tuple(-0.5 * trained for trained in trajectory.mask)
    for before, after in zip(sampler.asked, sampler.asked[1:], strict=False):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids  # turn k + 1 continues the ids of turn k
    verdict = task.grade_trajectory(example, trajectory)
    assert verdict.correct and verdict.format_ok


def answered(tokenizer: Any, turns: Sequence[str] | Iterator[str]) -> Any:
    renderer, _, example = rendered(tokenizer, "gsm8k")
    sampler = Script(tokenizer, turns)  # type: ignore[arg-type]
    ((found,),) = sample_trajectories(
        sampler, renderer, [renderer.prompt(example)], SamplingParams(stop=renderer.stop), context=2000
    )
    return found


def test_a_broken_call_is_told_so_and_the_model_goes_on(tokenizer: Any) -> None:
    found = answered(tokenizer, ["So <<12+>>", " again <<12*2>>", ".\n#### 24<|im_end|>"])
    assert found.text == "So <<12+>>[error: unexpected end] again <<12*2>>24.\n#### 24"
    assert (found.turns, found.finish_reason) == (3, "stop")


def test_calls_are_limited(tokenizer: Any) -> None:
    found = answered(tokenizer, (f"<<{k}+1>>" for k in range(99)))
    assert found.text.count(">>") == found.turns == MAX_CALLS + 1
    assert found.finish_reason == "turns" and found.text.endswith(f"<<{MAX_CALLS}+1>>")


def test_a_text_that_the_template_rewrites_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from grpo_gsm8k.errors import DataError

    class Shouting(Gsm8kCalculator):
        def target_turns(self, example: Any) -> Any:
            return [("model", "  <<12+5>>"), ("env", "17"), ("model", "  ")]  # the template strips the blanks

    tokenizer.save_pretrained(tmp_path)
    stripping = AutoTokenizer.from_pretrained(tmp_path)
    stripping.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    task = Shouting(TaskOptions(prompt_style="gsm8k"))
    with pytest.raises(DataError, match="does not render this answer as it is written"):
        Renderer(stripping, task).target(task.example(ROW))
