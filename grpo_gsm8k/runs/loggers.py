"""The loggers that `--log` names: W&B, TensorBoard and Trackio."""

from __future__ import annotations

from grpo_gsm8k.config import LOGGERS
from grpo_gsm8k.runs.sinks import Place, Sink
from grpo_gsm8k.runs.tensorboard_sink import TensorBoardSink
from grpo_gsm8k.runs.trackio_sink import TrackioSink
from grpo_gsm8k.runs.wandb_sink import WandbSink, wanted

KINDS: dict[str, type[Sink]] = dict(zip(LOGGERS, (WandbSink, TensorBoardSink, TrackioSink), strict=True))


def open_sinks(log: str, place: Place) -> list[Sink]:
    """The loggers of `--log`, and W&B where the environment enables it."""
    names = {name.strip() for name in log.split(",")} | ({"wandb"} if wanted() else set())
    return [kind(place) for name, kind in KINDS.items() if name in names]
