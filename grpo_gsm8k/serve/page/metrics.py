"""The service's state in Prometheus' text format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "grpo_gsm8k_"
Labels = Mapping[str, str]


@dataclass
class Family:
    """Samples of one name."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Labels, float]]

    def text(self) -> str:
        full = PREFIX + self.name
        lines = [f"# HELP {full} {self.help}", f"# TYPE {full} {self.kind}"]
        lines += [f"{full}{_labels(labels)} {_number(value)}" for labels, value in self.samples]
        return "\n".join(lines) + "\n"


def exposition(status: Mapping[str, Any]) -> str:
    """What `Service.status` and the rewards' run say, as one page of metrics."""
    queue, sessions, disk = status["queue"], status["sessions"], status["disk"]
    families = [
        Family("uptime_seconds", "gauge", "Seconds since the server started.", [({}, status["uptime_s"])]),
        Family("sessions", "gauge", "Sessions of clients.", [({}, sessions["live"])]),
        Family("sessions_total", "counter", "Sessions that were ever opened.", [({}, sessions["all"])]),
        Family(
            "queue_requests",
            "gauge",
            "Requests that wait.",
            [({"kind": kind}, queue[kind]) for kind in ("training", "sampling", "decoding")],
        ),
        Family(
            "queue_oldest_seconds",
            "gauge",
            "Age of the request that has waited longest.",
            [({}, queue["oldest_s"] or 0)],
        ),
        Family("disk_free_bytes", "gauge", "Bytes that are free where --out_dir is.", [({}, disk["free"])]),
        Family("disk_fault", "gauge", "1 while the journal cannot be written.", [({}, bool(disk["fault"]))]),
        Family("checkpoints", "gauge", "Checkpoints that clients saved.", [({}, status["checkpoints"])]),
        Family("models", "gauge", "Models that are trained.", [({}, status["models_in_all"])]),
        *_totals(status["totals"]),
        *_models(status["models"]),
        *_run(status.get("rollouts")),
    ]
    return "".join(family.text() for family in families if family.samples)


def _totals(totals: Mapping[str, float]) -> Iterable[Family]:
    for name, value in totals.items():
        said = name.replace("_", " ")
        yield Family(
            f"{name}_total", "counter", f"{said[:1].upper()}{said[1:]} since the server was made.", [({}, value)]
        )


def _models(models: Iterable[Mapping[str, Any]]) -> Iterable[Family]:
    found = list(models)

    def family(name: str, kind: str, help: str, key: str) -> Family:
        return Family(name, kind, help, [({"model": m["model_id"]}, float(m[key])) for m in found])

    yield family("model_steps_total", "counter", "Optimizer steps of a model.", "steps")
    yield family("model_queue_requests", "gauge", "Training requests of a model that wait.", "queued")
    yield family("model_resident", "gauge", "1 where a model is in memory, 0 where it is on disk.", "resident")
    last = [
        ({"model": m["model_id"], "metric": name}, value) for m in found for name, value in (m["last"] or {}).items()
    ]
    yield Family("model_metric", "gauge", "A metric of a model's last requests.", last)


def _run(run: Mapping[str, Any] | None) -> Iterable[Family]:
    if not run or not run["settings"]:
        return
    yield Family("rollouts_running", "gauge", "1 while the run takes rewards.", [({}, run["state"] == "running")])
    yield Family("rollouts_version", "gauge", "Updates of the run.", [({}, run["model_version"][1])])
    yield Family("rollouts_open", "gauge", "Rollouts that wait for a reward.", [({}, run["open_rollouts"])])
    yield Family(
        "rollouts_complete_groups", "gauge", "Groups that wait for a full batch.", [({}, run["complete_groups"])]
    )
    last = [({"metric": name}, value) for name, value in run["last_update"].items()]
    yield Family("rollouts_last_update", "gauge", "A metric of the last update.", last)


def _labels(labels: Labels) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in labels.items()]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)
