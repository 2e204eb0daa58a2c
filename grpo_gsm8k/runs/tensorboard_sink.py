"""Metrics and samples for TensorBoard, in the run's folder: `tensorboard --logdir RUN`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grpo_gsm8k.runs.clean import publishable
from grpo_gsm8k.runs.sinks import COLUMNS, Page, Place, Sink

FOLDER = "tensorboard"


class TensorBoardSink(Sink):
    """A queue of rows for TensorBoard."""

    title, extra = "TensorBoard", "tensorboard"

    def open(self) -> Page:
        """See `Sink.open`."""
        return TensorBoardPage(self.place)


class TensorBoardPage:
    """An event file; TensorBoard forgets what earlier files of the run have from its first step on."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter  # its methods have no annotations
        self.writer = make(str(place.folder / FOLDER), purge_step=place.first)
        settings = json.dumps(publishable(place.config), indent=2, default=str)
        self.writer.add_text("config", f"```json\n{settings}\n```", place.first - 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row; samples become a Markdown table."""
        for name, value in values.items():
            if isinstance(value, list):
                self.writer.add_text(name, markdown(value), step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def markdown(rows: list[list[Any]]) -> str:
    """Samples as a Markdown table."""
    cells = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in cells)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(mark, written)
    return text
