"""A child without a model, for the tests of what surrounds one: obedient, except for one fault.

`start["fault"]` names what goes wrong, once (the marker file remembers it) or, with `start["always"]`, each time.
`start["gate"]` is a file without which a `judge` does not return.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from grpo_gsm8k.engines.channel import serve


def build(start, pulse):
    held = {"version": -1}
    marker = Path(start.get("marker", "/nonexistent"))

    def faulty(name: str) -> bool:
        if start.get("fault") != name or (marker.exists() and not start.get("always")):
            return False
        marker.touch()
        return True

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def refusal(version, sha256, where):
        """Why a real engine would not take the file; only looked at where the test asks for it."""
        if not start.get("check"):
            return None
        from grpo_gsm8k.engines import handover

        try:
            handover.read(handover.of_json(version, sha256, where))
        except handover.HandoverError as fault:
            return {"refused": str(fault)}

    def load(version, sha256, where):
        if faulty("die_in_load"):
            die()
        if refused := refusal(version, sha256, where):
            return refused
        held["version"] = version
        return {"version": version, "sha256": sha256}

    def sample(requests, params):
        if faulty("die_in_sample"):
            die()
        if faulty("hang"):
            time.sleep(3600)
        if faulty("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if faulty("garbage"):
            os.write(int(sys.argv[1]), b"this is not JSON\n")
        if start.get("fault") == "slow":  # longer than the patience, but getting on
            for _ in range(30):
                time.sleep(0.1)
                pulse()
        old = faulty("old_weights")

        def completion(request, k, seed):
            ids = [*request["token_ids"][:2], 100 + k]
            return {
                "token_ids": ids,
                "logprobs": [-0.5] * (2 if faulty("fewer_logprobs") else 3),
                "text": "",
                "finish_reason": "stop",
                "policy_version": held["version"] - old,
                "seed": seed,
            }

        groups = [[completion(request, k, seed) for k, seed in enumerate(request["seeds"])] for request in requests]
        return {"completions": groups[1:] if faulty("fewer_groups") else groups}

    def score(rows):
        if faulty("die_in_score"):
            die()
        return {"logprobs": [[-float(i) for i in ids[faulty("fewer_scores") :]] for ids in rows]}

    def judge(version, sha256, where):
        if faulty("die_in_judge"):
            die()
        gate = Path(start.get("gate", "/"))
        while not gate.exists():
            time.sleep(0.02)
            pulse()
        if refused := refusal(version, sha256, where):
            return refused
        claimed = "0" * 64 if faulty("other_weights") else sha256
        row = {"id": "p1", "correct": True, "gold": "1", "weights_sha256": claimed}
        evaluation = {
            "accuracy": version / 100,
            "ci95": [0.0, 1.0],
            "n": 1,
            **{name: {"1": 1.0} for name in ("pass_at_k", "maj_at_k")},
            **dict.fromkeys(("strict_accuracy", "flexible_accuracy", "format_accuracy"), 1.0),
            **{name: {} for name in ("intervals", "by_seed", "spread")},
            "by_length": [],
            "truncated": 0.0,
            "reward": 0.0,
            "mean_tokens": 3.0,
            "tokens_per_s": 1.0,
            "seconds": 1.0,
            "weights_sha256": claimed,
            "rows": [row],
        }
        return {"version": version, "sha256": claimed, "evaluation": evaluation}

    def transfer(method, payload=None):
        if faulty("die_in_transfer"):
            die()
        return {}

    def hold(version):
        held["version"] = version
        return {}

    def ping():
        return {}

    return {
        "ping": ping,
        "transfer": transfer,
        "hold": hold,
        "load": load,
        "sample": sample,
        "score": score,
        "judge": judge,
    }


if __name__ == "__main__":
    serve(build)
