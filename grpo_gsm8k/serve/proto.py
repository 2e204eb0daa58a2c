"""The Tinker wire's protobuf messages, built from a table: field numbers are the wire, the rest is read off it.

A field is "number type name"; a leading `?` marks presence, `*` repetition, `|` one of the message's alternatives. A
type in capitals is an enumeration, `a>b` is a map. Everything is little-endian, tensors travel as bytes.
"""

from __future__ import annotations

import functools
from typing import Any

PACKAGE = "tinker_public"

ENUMS = {
    "DTYPE": ("DTYPE_UNSPECIFIED", "DTYPE_FLOAT32", "DTYPE_INT64", "DTYPE_INT32", "DTYPE_BFLOAT16"),
    "STOPREASON": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
}
MESSAGES: dict[str, tuple[str, ...]] = {
    "ForwardBackwardRequest": (
        "1 string model_id",
        "2 int32 seq_id",
        "3 *Datum data",
        "4 string loss_fn",
        "5 string>double loss_fn_config",
        "6 bool forward_only",
        "7 string>LossConfigValue loss_fn_config_v2",
    ),
    "LossConfigValue": ("1 |double number", "2 |string text"),
    "Datum": (
        "1 *Chunk model_input",
        "2 string>Tensor loss_fn_inputs",
        "3 *ProvenanceSpan model_input_spans",
        "4 *ProvenanceSpan loss_fn_input_spans",
    ),
    "Chunk": ("1 |EncodedTextChunk encoded_text", "2 |ImageChunk image", "3 |DmelChunk dmel"),
    "EncodedTextChunk": ("1 bytes tokens",),
    "ImageChunk": (
        "1 bytes data",
        "2 string format",
        "3 ?int32 expected_tokens",
        "4 ?ImageDimensions override_dimensions",
    ),
    "ImageDimensions": ("1 uint32 width", "2 uint32 height"),
    "DmelChunk": ("1 bytes dmel",),
    "ProvenanceSpan": ("1 |Span prompt_tokens", "2 |Span sampled_tokens"),
    "Span": ("1 string sequence_id", "2 int64 offset", "3 int64 length"),
    "Tensor": ("1 |bytes dense", "2 |SparseCsr sparse_csr", "3 DTYPE dtype", "4 *int64 shape"),
    "SparseCsr": ("1 bytes values", "2 bytes crow_indices", "3 bytes col_indices"),
    "ForwardBackwardOutput": (
        "1 string loss_fn_output_type",
        "2 *ArrayRecord loss_fn_outputs",
        "3 string>double metrics",
    ),
    "ArrayRecord": ("1 string type_tag", "2 string>BatchedTensor fields", "3 int64 num_datums"),
    "BatchedTensor": ("1 bytes data", "2 bytes offsets", "3 DTYPE dtype", "4 *int64 trailing_shape"),
    "SampleResponse": (
        "1 *SampledSequence sequences",
        "2 ?bytes prompt_logprobs",
        "3 ?TopkLogprobs topk_prompt_logprobs",
        "4 int32 prompt_cache_hit_tokens",
        "5 ?Tensor target_prompt_logprobs",
        "6 ?PromptAltTokens prompt_alt_tokens",
    ),
    "PromptAltTokens": ("1 Tensor tokens", "2 Tensor logprobs"),
    "SampledSequence": (
        "1 STOPREASON stop_reason",
        "2 bytes tokens",
        "3 ?bytes logprobs",
        "4 ?TopkLogprobs topk_sampled_logprobs",
    ),
    "TopkLogprobs": ("1 bytes token_ids", "2 bytes logprobs", "3 uint32 k", "4 uint32 length"),
}
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1


def message(name: str) -> Any:
    """A new message of this name."""
    return _classes()[name]()


@functools.cache
def _classes() -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        _describe(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


def _describe(described: Any, fields: tuple[str, ...]) -> None:
    """Add a message's fields; every map gets the nested entry type that protobuf makes of it."""
    alternatives = any("|" in text for text in fields)
    if alternatives:
        described.oneof_decl.add(name="kind")
    for text in fields:
        number, kind, name = text.split()
        field = described.field.add(name=name, number=int(number), label=3 if "*" in kind or ">" in kind else 1)
        bare = kind.lstrip("?*|")
        if ">" in bare:
            key, value = bare.split(">")
            entry = described.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            _set_type(entry.field.add(name="key", number=1, label=1), key)
            _set_type(entry.field.add(name="value", number=2, label=1), value)
            field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{described.name}.{entry.name}"
        else:
            _set_type(field, bare)
        if kind.startswith("|"):
            field.oneof_index = 0
    # A presence mark is a oneof of its own, and those must come behind the real ones.
    for text in fields:
        number, kind, name = text.split()
        if kind.startswith("?"):
            field = next(f for f in described.field if f.name == name)
            field.proto3_optional, field.oneof_index = True, len(described.oneof_decl)
            described.oneof_decl.add(name=f"_{name}")


def _set_type(field: Any, kind: str) -> None:
    if kind in MESSAGES or kind in ENUMS:
        field.type = field.TYPE_MESSAGE if kind in MESSAGES else field.TYPE_ENUM
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
