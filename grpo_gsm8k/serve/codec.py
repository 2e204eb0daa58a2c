"""Results as bytes: in the journal, and as the Tinker wire sends them in protobuf or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_gsm8k.serve import proto
from grpo_gsm8k.serve.jobs import Chosen, SampledSequence, SampleResult, Table, TrainingResult

TENSORS = {proto.FLOAT32: "<f4", proto.INT64: "<i8"}
NO_TOKEN, NO_LOGPROB = 0, -99999.0  # an empty cell of a table of likeliest tokens


def encode(value: Any) -> bytes:
    """A result for the journal; of a sample or a forward_backward also what goes over the wire."""
    if isinstance(value, SampleResult):
        return _sample_message(value)
    if isinstance(value, TrainingResult):
        return _training_message(value)
    return json.dumps(value).encode()


def decode(kind: str, stored: bytes) -> Any:
    """What `encode` was given."""
    if kind == "sample":
        return _sample_of(stored)
    if kind == "forward_backward":
        return _training_of(stored)
    return json.loads(stored)


def is_binary(kind: str) -> bool:
    """Whether `encode` makes protobuf of it."""
    return kind in ("sample", "forward_backward")


def as_json(value: Any) -> Any:
    """A result as clients before 0.25 read it."""
    if isinstance(value, SampleResult):
        return {
            "type": "sample",
            "sequences": [
                {
                    "tokens": list(s.token_ids),
                    "logprobs": list(s.logprobs),
                    "stop_reason": s.stop_reason,
                    **({"topk_logprobs": [_pairs(row) for row in s.topk]} if s.topk else {}),
                }
                for s in value.sequences
            ],
            "prompt_logprobs": None if value.prompt_logprobs is None else list(value.prompt_logprobs),
            "topk_prompt_logprobs": None
            if value.topk_prompt is None
            else [_pairs(row) if row else None for row in value.topk_prompt],
        }
    if isinstance(value, TrainingResult):
        return {
            "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": [
                {"logprobs": {"data": a.ravel().tolist(), "dtype": "float32", "shape": list(a.shape)}}
                for a in value.logprobs
            ],
            "metrics": dict(value.metrics),
        }
    return value


def _pairs(row: Chosen) -> list[list[float]]:
    return [[token, logp] for token, logp in row]


def _sample_message(value: SampleResult) -> bytes:
    sent = proto.message("SampleResponse")
    for sequence in value.sequences:
        one = sent.sequences.add()
        one.stop_reason = proto.STOP if sequence.stop_reason == "stop" else proto.LENGTH
        one.tokens = np.array(sequence.token_ids, "<i4").tobytes()
        one.logprobs = np.array(sequence.logprobs, "<f4").tobytes()
        if sequence.topk:
            _fill_table(one.topk_sampled_logprobs, sequence.topk)
    if value.prompt_logprobs is not None:
        numbers = [math.nan if logp is None else logp for logp in value.prompt_logprobs]
        sent.prompt_logprobs = np.array(numbers, "<f4").tobytes()
    if value.topk_prompt is not None:
        _fill_table(sent.topk_prompt_logprobs, value.topk_prompt)
    if value.targets is not None:
        _fill_tensor(sent.target_prompt_logprobs, value.targets, proto.FLOAT32)
    if value.alternatives is not None:
        _fill_tensor(sent.prompt_alt_tokens.tokens, value.alternatives[0], proto.INT64)
        _fill_tensor(sent.prompt_alt_tokens.logprobs, value.alternatives[1], proto.FLOAT32)
    data: bytes = sent.SerializeToString(deterministic=True)
    return data


def _fill_tensor(tensor: Any, table: Table, dtype: int) -> None:
    values = np.array(table.values, TENSORS[dtype]).tobytes()
    tensor.dtype = dtype
    tensor.shape.extend(table.shape)
    if table.crow is None or table.col is None:
        tensor.dense = values
        return
    sparse = tensor.sparse_csr
    sparse.values = values
    sparse.crow_indices, sparse.col_indices = (np.array(part, "<i8").tobytes() for part in (table.crow, table.col))


def _tensor_of(tensor: Any) -> Table:
    shape = (tensor.shape[0], tensor.shape[1])
    if tensor.WhichOneof("kind") == "sparse_csr":
        parts = (tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices)
        crow, col = (tuple(np.frombuffer(part, "<i8").tolist()) for part in parts)
        return Table(shape, tuple(np.frombuffer(tensor.sparse_csr.values, TENSORS[tensor.dtype]).tolist()), crow, col)
    return Table(shape, tuple(np.frombuffer(tensor.dense, TENSORS[tensor.dtype]).tolist()))


def _fill_table(table: Any, rows: Sequence[Chosen]) -> None:
    table.k, table.length = max(map(len, rows), default=0), len(rows)
    empty = (NO_TOKEN, NO_LOGPROB)
    cells = [row[i] if i < len(row) else empty for row in rows for i in range(table.k)]
    table.token_ids = np.array([token for token, _ in cells], "<i4").tobytes()
    table.logprobs = np.array([logp for _, logp in cells], "<f4").tobytes()


def _table(table: Any) -> tuple[Chosen, ...]:
    shape = (table.length, table.k)
    ids = np.frombuffer(table.token_ids, "<i4").reshape(shape).tolist()
    logprobs = np.frombuffer(table.logprobs, "<f4").reshape(shape).tolist()
    return tuple(
        tuple((token, logp) for token, logp in zip(*row, strict=True) if logp > NO_LOGPROB)
        for row in zip(ids, logprobs, strict=True)
    )


def _sample_of(stored: bytes) -> SampleResult:
    sent = proto.message("SampleResponse")
    sent.ParseFromString(stored)
    sequences = tuple(
        SampledSequence(
            tuple(np.frombuffer(one.tokens, "<i4").tolist()),
            tuple(np.frombuffer(one.logprobs, "<f4").tolist()),
            "stop" if one.stop_reason == proto.STOP else "length",
            _table(one.topk_sampled_logprobs) if one.HasField("topk_sampled_logprobs") else (),
        )
        for one in sent.sequences
    )
    logprobs = None
    if sent.HasField("prompt_logprobs"):
        numbers = np.frombuffer(sent.prompt_logprobs, "<f4").tolist()
        logprobs = tuple(None if math.isnan(logp) else logp for logp in numbers)
    topk = _table(sent.topk_prompt_logprobs) if sent.HasField("topk_prompt_logprobs") else None
    targets = _tensor_of(sent.target_prompt_logprobs) if sent.HasField("target_prompt_logprobs") else None
    drawn = sent.prompt_alt_tokens if sent.HasField("prompt_alt_tokens") else None
    alternatives = (_tensor_of(drawn.tokens), _tensor_of(drawn.logprobs)) if drawn is not None else None
    return SampleResult(sequences, logprobs, topk, targets, alternatives)


def _training_message(value: TrainingResult) -> bytes:
    """One record a datum: clients put them end to end."""
    sent = proto.message("ForwardBackwardOutput")
    sent.loss_fn_output_type = "ArrayRecord"
    for array in value.logprobs:
        record = sent.loss_fn_outputs.add()
        record.num_datums = 1
        field = record.fields["logprobs"]
        field.dtype, field.data = proto.FLOAT32, array.tobytes()
        field.offsets = np.array([0, array.nbytes], "<i8").tobytes()
        field.trailing_shape.extend(array.shape[1:])
    for name, number in value.metrics.items():
        sent.metrics[name] = number
    data: bytes = sent.SerializeToString(deterministic=True)
    return data


def _training_of(stored: bytes) -> TrainingResult:
    sent = proto.message("ForwardBackwardOutput")
    sent.ParseFromString(stored)
    fields = [record.fields["logprobs"] for record in sent.loss_fn_outputs]
    arrays = tuple(np.frombuffer(f.data, "<f4").reshape(-1, *f.trailing_shape) for f in fields)
    return TrainingResult(arrays, dict(sent.metrics))
