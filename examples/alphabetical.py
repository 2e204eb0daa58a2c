"""Learn to sort words: the server samples and trains, the rewards are given here. Needs the standard library alone.

grpo-gsm8k serve --model_id MODEL            # prints its key
GRPO_GSM8K_KEY=tml-… python examples/alphabetical.py http://127.0.0.1:8000 [UPDATES]
"""

import difflib
import json
import os
import random
import sys
import urllib.error
import urllib.request

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "owl", "pig", "rat", "yak"]


def call(path: str, body: dict | None = None) -> dict:
    """One request; the server's own words where it refuses."""
    headers = {"X-API-Key": os.environ["GRPO_GSM8K_KEY"], "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, data, headers), timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as fault:
        sys.exit(f"{path}: {json.load(fault)['error']['message']}")


def reward(text: str, words: list[str]) -> float:
    """How much of the answer is the sorted list: 1 for the list itself, 0 for nothing in common."""
    return difflib.SequenceMatcher(None, text, " ".join(sorted(words)), autojunk=False).ratio()


def main() -> None:
    updates = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    call("/v1/start", {"n": 8, "groups_per_batch": 8, "max_tokens": 12, "learning_rate": 3e-3, "normalize": "std"})
    draw = random.Random(0)
    for update in range(1, updates + 1):
        asked = [draw.sample(WORDS, 3) for _ in range(8)]
        found = call("/v1/rollouts", {"prompts": [f"Sort: {' '.join(words)}\n" for words in asked]})
        rewards = [
            {"rollout_id": completion["rollout_id"], "reward": reward(completion["text"], words)}
            for words, group in zip(asked, found["rollouts"], strict=True)
            for completion in group["completions"]
        ]
        call("/v1/rewards", {"rewards": rewards})
        mean = sum(one["reward"] for one in rewards) / len(rewards)
        example = found["rollouts"][0]
        print(
            f"{update}: reward {mean:.3f}  {example['prompt']!r} -> {example['completions'][0]['text']!r}", flush=True
        )


if __name__ == "__main__":
    main()
