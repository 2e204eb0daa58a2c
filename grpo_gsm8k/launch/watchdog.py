"""The pod's own end: what the container runs while it waits for a job. No library but the standard one.

    python -m grpo_gsm8k.launch.watchdog

It ends the pod when its deadline has passed, when the job has ended and nobody came for the results within the
grace period, when the job (or whoever should start one) has been silent for too long, when the container was
restarted after the job had ended (DONE is there), and when it was restarted too often.

Ending goes through the API with the key that the provider gives each pod. What that key may do is not documented: it
is tried at boot, and the log says what came of it. Where it may not, the job is killed, which saves no money, and that
is said too; the launcher and `reap` do not rely on any of this.

The environment: GRPO_GSM8K_DEADLINE (seconds since 1970), GRPO_GSM8K_GRACE_S, GRPO_GSM8K_STALE_S, and the provider's
RUNPOD_POD_ID and RUNPOD_API_KEY.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grpo_gsm8k.launch.settings import API

JOB = "grpo-job"  # in the home folder: run.sh env pid log status, work/ (the job's own folder), boots, DONE
FETCHING = "fetching"  # in it: touched while the launcher fetches the results
MOST_BOOTS = 5


@dataclass(frozen=True)
class Limits:
    """When a pod must end: `deadline` in seconds since 1970, the others in seconds."""

    deadline: float
    grace_s: float
    stale_s: float

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Limits:
        """As the environment says; without a deadline, a day from now."""
        return cls(
            _seconds(env.get("GRPO_GSM8K_DEADLINE"), time.time() + 86400),
            _seconds(env.get("GRPO_GSM8K_GRACE_S"), 900),
            _seconds(env.get("GRPO_GSM8K_STALE_S"), 3600),
        )


def _seconds(text: str | None, otherwise: float) -> float:
    """A number; what is none, or never comes (inf, nan), does not keep a pod alive."""
    try:
        value = float(text or otherwise)
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise


def reason_to_end(job: Path, limits: Limits, booted: float, now: float) -> str:
    """Why the pod must end now; empty while it need not."""
    if now >= limits.deadline:
        return "its deadline has passed"
    if (job / "DONE").exists():
        return "the container was started again after its job had ended"
    if _boots(job) > MOST_BOOTS:
        return f"the container was started {_boots(job)} times"
    ended = _changed(job / "status")
    if ended and now - max(ended, _changed(job / FETCHING)) >= limits.grace_s:
        return "the job has ended and nobody came for the results"
    heard = max([booted, *(_changed(path) for path in [job / "log", *(job / "work").rglob("*")])])
    if not ended and now - heard >= limits.stale_s:
        return f"nothing was heard of a job for {now - heard:.0f} s"
    return ""


def end(job: Path, env: Mapping[str, str]) -> str:
    """End the pod, or at least its job; returns what became of it."""
    job.mkdir(exist_ok=True)
    (job / "DONE").touch()
    fault = _call(env, "POST", "/action", {"action": "terminate"})
    if not fault:
        return "asked the provider to end this pod"
    killed = _kill(job)
    return f"CANNOT END THIS POD ({fault}), IT GOES ON COSTING MONEY{'; its job was killed' if killed else ''}"


def watch(home: Path, env: Mapping[str, str], every_s: float) -> None:
    """Until the end, and then on: a container whose command returns is started again."""
    job, limits, booted = home / JOB, Limits.of(env), time.time()
    job.mkdir(exist_ok=True)
    (job / "boots").write_text(str(_boots(job) + 1))
    fault = _call(env, "GET", "")
    _say(f"this pod's own key does not reach it: {fault}" if fault else "this pod's own key sees it")
    while True:
        if why := reason_to_end(job, limits, booted, time.time()):
            _say(f"{why}: {end(job, env)}")
        time.sleep(every_s)


def _call(env: Mapping[str, str], method: str, path: str, body: Mapping[str, str] | None = None) -> str:
    """What went wrong with a request about this very pod; empty if nothing did. The key is in no message."""
    pod, key = env.get("RUNPOD_POD_ID"), env.get("RUNPOD_API_KEY")
    if not pod or not key:
        return "RUNPOD_POD_ID or RUNPOD_API_KEY is not set"
    base = (env.get("RUNPOD_API_BASE_URL") or API).rstrip("/")
    if not base.startswith(("https://", "http://")):
        return "RUNPOD_API_BASE_URL is no address"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body else None
    try:
        request = urllib.request.Request(f"{base}/pods/{quote(pod, safe='')}{path}", data, headers, method=method)
        with _OPENER.open(request, timeout=30):  # its body is not read
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP {error.code}" + (", a redirect, which is not followed" if 300 <= error.code < 400 else "")
    except (OSError, HTTPException, ValueError) as error:  # its text may hold the key
        return type(error).__name__


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the provider alone, and "terminate" is not done where another address says 200."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _kill(job: Path) -> bool:
    try:
        os.killpg(int((job / "pid").read_text()), signal.SIGKILL)
    except (OSError, ValueError):
        return False
    return True


def _boots(job: Path) -> int:
    try:
        return int((job / "boots").read_text())
    except (OSError, ValueError):
        return 0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a checkpoint that was retired while we looked
        return 0.0


def _say(message: str) -> None:
    print(f"watchdog: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Watch; SIGTERM from the container's runtime ends it at once."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    watch(Path.home(), os.environ, float(os.environ.get("GRPO_GSM8K_WATCH_S") or 15))


if __name__ == "__main__":
    main()
