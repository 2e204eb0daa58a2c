"""The weights that are sampled from: the base's, adapters on it, or once more all of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec, copy_into
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.learn import stored_weights
from grpo_gsm8k.serve.sampling import Sampler

HELD = 16  # adapters in memory


class SampleWeights:
    """Brings what a folder holds into memory, the least recently used adapter making room."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        """`base` may be the one that is trained on, or another copy of it on another device."""
        self.base, self.folder = base, folder
        self.sampler = Sampler(base)
        self._adapters: OrderedDict[str, str] = OrderedDict()  # folder → name on the base
        self._whole: tuple[str, Any] = ("", None)  # folder, a model of its own
        self._names = 0

    def model(self, folder: str) -> Any:
        """The model with what a folder holds; "" is the base. Raises `Refusal` if it is gone."""
        if not folder:
            return self.base.activate("")
        if folder in self._adapters:
            self._adapters.move_to_end(folder)
            return self.base.activate(self._adapters[folder])
        if self._whole[0] == folder:
            return self._whole[1]
        where = self.folder / folder
        if not where.is_dir():
            raise Refusal("these weights have been deleted", 404)
        spec = ModelSpec(**json.loads((where / "spec.json").read_text()))
        if not spec.rank:
            return self._take_whole(folder)
        while len(self._adapters) >= HELD:
            self.base.drop(self._adapters.popitem(last=False)[1])
        self._names += 1
        name = f"s{self._names}"
        self.base.put(name, spec, stored_weights(where, self.base.model.dtype))
        self._adapters[folder] = name
        return self.base.activate(name)

    def is_whole(self, folder: str) -> bool:
        """Whether a folder holds weights of their own, of which one set at a time is in memory."""
        return bool(folder) and not (self.folder / folder / "adapter_config.json").is_file()

    def _take_whole(self, folder: str) -> Any:
        model = self._whole[1]
        if model is None:
            model = self.base.copy()
            self.sampler.prepare(model)
        copy_into(dict(model.named_parameters()), stored_weights(self.folder / folder, model.dtype))
        self._whole = (folder, model)
        return model
