"""What a client sends to train on: read from protobuf or JSON, and refused in one line where it cannot be trained.

A datum is N input tokens and named tensors in the shape of its targets: `(N,)`, or `(N, K)` where each position has K
weighted targets. `target_tokens[i]` is predicted at position i; nothing is shifted here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grpo_gsm8k.serve import proto
from grpo_gsm8k.serve.jobs import Refusal, Table

Array = npt.NDArray[Any]

F4, I8, I4 = np.dtype("<f4"), np.dtype("<i8"), np.dtype("<i4")
DTYPES: dict[str, np.dtype[Any]] = {"float32": F4, "int64": I8}
WIRE_DTYPES: dict[int, np.dtype[Any]] = {proto.FLOAT32: F4, proto.INT64: I8, proto.INT32: I4}
MOST_DATA, MOST_TARGETS = 65536, 1024
"""Data of one call, and targets of one position."""


@dataclass(frozen=True)
class WireDatum:
    """One row: `tokens` `(N,)` int64, and inputs of the loss by name, dense."""

    tokens: Array
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class TrainingJob:
    """A forward_backward call, or with `forward_only` a forward."""

    data: tuple[WireDatum, ...]
    loss_fn: str
    config: Mapping[str, Any]
    forward_only: bool = False


def from_proto(body: bytes) -> TrainingJob:
    """Read a `ForwardBackwardRequest`. Raises `Refusal` for what cannot be read."""
    sent = proto.message("ForwardBackwardRequest")
    sent.ParseFromString(body)
    config: dict[str, Any] = dict(sent.loss_fn_config)
    if sent.loss_fn_config_v2:
        config = {key: getattr(v, v.WhichOneof("kind") or "number") for key, v in sent.loss_fn_config_v2.items()}
    data = []
    for number, datum in enumerate(sent.data):
        where = f"data[{number}]"
        tokens = [_proto_chunk(chunk, where) for chunk in datum.model_input]
        inputs = {name: _proto_tensor(t, f"{where}.{name}") for name, t in sorted(datum.loss_fn_inputs.items())}
        data.append(WireDatum(np.concatenate(tokens or [np.zeros(0, "<i8")]), inputs))
    return TrainingJob(tuple(data), sent.loss_fn, config, bool(sent.forward_only))


def from_json(sent: Any, forward_only: bool = False) -> TrainingJob:
    """Read `forward_backward_input` (or `forward_input`) as JSON has it. Raises `Refusal` for what cannot be read."""
    sent = _mapping(sent, "forward_input" if forward_only else "forward_backward_input")
    rows = sent.get("data")
    if not isinstance(rows, list):
        raise Refusal("data must be a list of {model_input, loss_fn_inputs}")
    data = []
    for number, row in enumerate(rows):
        where = f"data[{number}]"
        row = _mapping(row, where)
        inputs = _mapping(row.get("loss_fn_inputs"), f"{where}.loss_fn_inputs")
        tensors = {str(name): _json_tensor(value, f"{where}.{name}") for name, value in sorted(inputs.items())}
        data.append(WireDatum(token_ids(row.get("model_input"), where), tensors))
    config = sent.get("loss_fn_config")
    return TrainingJob(
        tuple(data), str(sent.get("loss_fn")), _mapping(config, "loss_fn_config") if config else {}, forward_only
    )


def token_ids(model_input: Any, where: str = "prompt") -> Array:
    """The ids `(N,)` of a `ModelInput` in JSON."""
    chunks = _mapping(model_input, where).get("chunks")
    if not isinstance(chunks, list):
        raise Refusal(f"{where}: chunks must be a list of {{tokens: [...]}}")
    ids: list[int] = []
    for chunk in chunks:
        chunk = _mapping(chunk, f"{where}.chunks")
        kind, tokens = chunk.get("type", "encoded_text"), chunk.get("tokens")
        if kind != "encoded_text":
            raise Refusal(f"{where}: chunks of type {kind!r} are not served; text alone is (encoded_text)")
        if not isinstance(tokens, list) or any(type(t) is not int for t in tokens):
            raise Refusal(f"{where}: tokens must be a list of whole numbers")
        ids += tokens
    return _whole(ids, where)


def check(job: TrainingJob, vocabulary: int, context: int) -> None:
    """Raise `Refusal` unless every row can be read by the model and every tensor has its target's shape."""
    if not 0 < len(job.data) <= MOST_DATA:
        raise Refusal(f"{len(job.data)} data in one call; it takes 1 to {MOST_DATA}")
    for number, datum in enumerate(job.data):
        where, length = f"data[{number}]", len(datum.tokens)
        if not 0 < length <= context:
            raise Refusal(f"{where}: {length} tokens; the model reads 1 to {context}")
        _in_vocabulary(datum.tokens, vocabulary, f"{where}.model_input")
        targets = datum.inputs.get("target_tokens")
        if targets is None:
            raise Refusal(f"{where}: target_tokens are missing")
        if targets.ndim not in (1, 2) or len(targets) != length or not 0 < targets.size <= length * MOST_TARGETS:
            raise Refusal(
                f"{where}.target_tokens: shape {list(targets.shape)} for {length} tokens; it must be [{length}] or "
                f"[{length}, K] with K up to {MOST_TARGETS}"
            )
        if targets.dtype.kind != "i":
            raise Refusal(f"{where}.target_tokens: must be whole numbers (int64)")
        _in_vocabulary(targets, vocabulary, f"{where}.target_tokens")
        for name, tensor in datum.inputs.items():
            if tensor.shape != targets.shape:
                raise Refusal(
                    f"{where}.{name}: shape {list(tensor.shape)}, the targets have {list(targets.shape)}; they must "
                    "be the same"
                )
            if not np.isfinite(tensor).all():
                raise Refusal(f"{where}.{name}: holds NaN or infinite numbers")


def _in_vocabulary(ids: Array, vocabulary: int, where: str) -> None:
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if strange.size:
        raise Refusal(f"{where}: id {int(strange.flat[0])} is not in the vocabulary of {vocabulary}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"{where} must be an object")
    return value


def _whole(values: Any, where: str) -> Array:
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise Refusal(f"{where}: holds a number beyond 64 bits") from None


def _json_tensor(value: Any, where: str) -> Array:
    sent = _mapping(value, where)
    flat, dtype = sent.get("data"), sent.get("dtype", "float32")
    if dtype not in DTYPES:
        raise Refusal(f"{where}: dtype {dtype!r}; it must be one of {', '.join(DTYPES)}")
    kinds = (int,) if dtype == "int64" else (int, float)
    if not isinstance(flat, list) or any(type(x) not in kinds for x in flat):
        raise Refusal(f"{where}: data must be a flat list of {'whole ' if dtype == 'int64' else ''}numbers")
    numbers = _whole(flat, where) if dtype == "int64" else np.array(flat, dtype=np.float64).astype(DTYPES[dtype])
    rows, columns = (sent.get(f"sparse_{which}_indices") for which in ("crow", "col"))
    if rows is None and columns is None:
        return _shaped(numbers, sent.get("shape"), where)
    indices = []
    for part in (rows, columns):
        if not isinstance(part, list) or any(type(x) is not int for x in part):
            raise Refusal(f"{where}: sparse indices must be lists of whole numbers")
        indices.append(_whole(part, where))
    return _dense(numbers, indices[0], indices[1], sent.get("shape"), where)


def table(sent: Any, where: str) -> Table | None:
    """A matrix of ids in JSON in its own layout; None for null. Raises `Refusal`."""
    if sent is None:
        return None
    dense = _json_tensor(sent, where)
    if dense.ndim != 2 or dense.dtype.kind != "i":
        raise Refusal(f"{where}: must be whole numbers (int64) of a shape [N, K]")
    shape = (dense.shape[0], dense.shape[1])
    if sent.get("sparse_crow_indices") is None:
        return Table(shape, tuple(dense.ravel().tolist()))
    return Table(shape, tuple(sent["data"]), tuple(sent["sparse_crow_indices"]), tuple(sent["sparse_col_indices"]))


def _proto_chunk(chunk: Any, where: str) -> Array:
    if (kind := chunk.WhichOneof("kind")) != "encoded_text":
        raise Refusal(f"{where}: chunks of type {kind!r} are not served; text alone is (encoded_text)")
    return _bytes(chunk.encoded_text.tokens, np.dtype("<i4"), where).astype(np.int64)


def _proto_tensor(tensor: Any, where: str) -> Array:
    dtype, shape = WIRE_DTYPES.get(tensor.dtype), list(tensor.shape) or None
    if tensor.dtype == proto.BFLOAT16:
        raise Refusal(f"{where}: bfloat16 is not read here; send float32")
    if dtype is None:
        raise Refusal(f"{where}: has no dtype that is known")
    if tensor.WhichOneof("kind") == "sparse_csr":
        sparse = tensor.sparse_csr
        rows, columns = (_bytes(part, np.dtype("<i8"), where) for part in (sparse.crow_indices, sparse.col_indices))
        return _dense(_bytes(sparse.values, dtype, where), rows, columns, shape, where)
    return _shaped(_bytes(tensor.dense, dtype, where), shape, where)


def _bytes(raw: bytes, dtype: np.dtype[Any], where: str) -> Array:
    if len(raw) % dtype.itemsize:
        raise Refusal(f"{where}: {len(raw)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(raw, dtype)


def _shaped(flat: Array, shape: Any, where: str) -> Array:
    if shape is None:
        return flat
    if not _is_shape(shape) or math.prod(shape) != flat.size:
        raise Refusal(f"{where}: {flat.size} numbers do not fill the shape {str(shape)[:80]}")
    return flat.reshape(shape)


def _dense(values: Array, rows: Array, columns: Array, shape: Any, where: str) -> Array:
    """A CSR matrix, 0 where it lists nothing."""
    if not _is_shape(shape) or len(shape) != 2 or math.prod(shape) > 2**27:
        raise Refusal(f"{where}: a sparse tensor needs the shape [N, K] that it stands for")
    lengths = np.diff(rows)
    fits = (
        (len(rows), len(values)) == (shape[0] + 1, len(columns))
        and (rows[0], rows[-1]) == (0, len(values))
        and (lengths >= 0).all()
        and ((columns >= 0) & (columns < shape[1])).all()
    )
    if not fits:
        raise Refusal(f"{where}: sparse indices that do not describe a matrix of shape {list(shape)}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), lengths), columns] = values
    return dense


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**31 for n in shape)


# ------------------------------------------------------------------------- requests of our own, and what is kept


def as_json(rows: Iterable[Mapping[str, Any]], loss_fn: str, config: Any) -> bytes:
    """A call made inside this process, as a client would send it; a row is {"tokens": [...], "inputs": {...}}."""
    data = []
    for row in rows:
        inputs = {
            name: {"data": list(values), "dtype": "int64" if name == "target_tokens" else "float32"}
            for name, values in row["inputs"].items()
        }
        data.append({"model_input": {"chunks": [{"tokens": list(row["tokens"])}]}, "loss_fn_inputs": inputs})
    sent = {"data": data, "loss_fn": loss_fn, "loss_fn_config": config or {}}
    return json.dumps({"forward_backward_input": sent}).encode()
