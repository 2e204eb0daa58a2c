"""A reward of one's own: the right answer, and a bonus for a short way to it.

    grpo-gsm8k grpo --preset quick --data artifacts/data --reward examples.reward:short_and_right

The function is called once for each completion. It returns a number or, as here, named parts: their sum is the reward,
and each is logged as `reward/<name>`.
"""

from grpo_gsm8k.tasks.gsm8k.grading import grade

BUDGET = 200  # tokens within which an answer earns all of the bonus


def short_and_right(completion, example):
    """1 for the right answer; up to 0.2 more, which fades between `BUDGET` and twice as many tokens."""
    right = grade(completion.text, example.answer)
    over = max(0.0, len(completion.token_ids) / BUDGET - 1)
    return {"right": float(right), "brevity": 0.2 * right * max(0.0, 1 - over)}
