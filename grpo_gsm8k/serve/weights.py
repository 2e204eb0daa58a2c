"""The weights that are sampled from: the base's, adapters on it, or once more all of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_gsm8k.serve.adapters import BaseModel, ModelSpec, Tensors, copy_into
from grpo_gsm8k.serve.jobs import Refusal
from grpo_gsm8k.serve.learn import stored_weights
from grpo_gsm8k.serve.sampling import Sampler

HELD = 16  # adapters in memory
ALIKE = 4  # of them of one rank on the same layers, as many as are decoded in turns (`engine.BATCHES`)


@dataclass(frozen=True)
class _Slot:
    """An adapter on the base that holds one folder's weights, and later another's."""

    name: str
    kind: ModelSpec
    parameters: Tensors


class SampleWeights:
    """Brings what a folder holds into memory, the least recently used adapter making room.

    An adapter takes in the weights of another one of its kind in a tenth of the time in which a new one is laid.
    """

    def __init__(self, base: BaseModel, folder: Path) -> None:
        """`base` may be the one that is trained on, or another copy of it on another device."""
        self.base, self.folder = base, folder
        self.sampler = Sampler(base)
        self._adapters: OrderedDict[str, _Slot] = OrderedDict()  # by folder
        self._whole: tuple[str, Any] = ("", None)  # folder, a model of its own
        self._names = 0
        self._together: dict[ModelSpec, bool] = {}

    def model(self, folder: str) -> Any:
        """The model with what a folder holds; "" is the base. Raises `Refusal` if it is gone."""
        if not folder:
            return self.base.activate("")
        if folder in self._adapters:
            self._adapters.move_to_end(folder)
            return self.base.activate(self._adapters[folder].name)
        if self._whole[0] == folder:
            return self._whole[1]
        where = self.folder / folder
        if not where.is_dir():
            raise Refusal("these weights have been deleted", 404)
        spec = ModelSpec(**json.loads((where / "spec.json").read_text()))
        if not spec.rank:
            return self._take_whole(folder)
        slot = self._adapters[folder] = self._slot(spec, stored_weights(where, self.base.model.dtype))
        return self.base.activate(slot.name)

    def _slot(self, spec: ModelSpec, tensors: Tensors) -> _Slot:
        """An adapter with these weights: a new one, or one that held others of this kind."""
        kind = replace(spec, seed=0)  # which decides how it begins
        alike = [folder for folder, slot in self._adapters.items() if slot.kind == kind]
        if len(alike) >= ALIKE:
            copy_into(self._adapters[alike[0]].parameters, tensors)
            return self._adapters.pop(alike[0])
        while len(self._adapters) >= HELD:
            self.base.drop(self._adapters.popitem(last=False)[1].name)
        self._names += 1
        name = f"s{self._names}"
        self.base.put(name, spec, tensors)
        return _Slot(name, kind, dict(self.base.parameters(name)))

    def together(self, folder: str) -> bool:
        """Whether samples from what a folder holds may be decoded side by side."""
        try:
            spec = ModelSpec(**json.loads((self.folder / folder / "spec.json").read_text()))
        except FileNotFoundError:  # the base; or what has been deleted, and `model` says so
            spec = ModelSpec(rank=0)
        kind = replace(spec, seed=0)
        if kind not in self._together:
            layers = self.base.targets(spec) if spec.rank else []
            self._together[kind] = self.sampler.adapted(self.base.model, layers, spec.rank)
        return self._together[kind]

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
