"""The text of ``config.pbtxt``, derived from the graph.

The messages and fields are those of ``model_config.proto`` of Triton's `common` repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from echoquad_runtime.bundle.onnx_header import ValueInfo

__all__ = ["LABELS", "MAX_QUEUED", "MODEL_FILE", "VERSION", "Device", "ModelConfig", "WarmUp", "encode_config"]

LABELS: Final = "labels.txt"
MODEL_FILE: Final = "model.onnx"
VERSION: Final = 1
"""The one version that is served: labels, warm-up and parameters belong to it."""
MAX_QUEUED: Final = 256
"""Requests that may wait; Triton refuses further ones instead of letting them wait without bound."""

Device = Literal["cpu", "gpu"]

_DATA_TYPES: Final = {"uint8": "TYPE_UINT8", "int64": "TYPE_INT64", "float32": "TYPE_FP32"}


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Requests that Triton runs before the model is ready.

    Attributes
    ----------
    name
        Name of the sample in Triton's log.
    file
        File in the folder ``warmup``: the grey levels of one frame, row by row, one byte each.
    shape
        Height and width of the frame.
    count
        Number of requests with this frame that are run as one batch.
    """

    name: str
    file: str
    shape: tuple[int, int]
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a ``config.pbtxt`` states.

    Attributes
    ----------
    name
        The model, which is the name of its folder.
    comment
        First line of the file.
    inputs, outputs
        Those of the graph, with the batch as first dimension.
    scores
        Name of the output with one score per class, which `LABELS` names.
    max_batch_size
        Frames of a batch; 0 if Triton must not form batches.
    warm_ups
        Requests before the model is ready.
    parameters
        Facts about the model. Triton and its onnxruntime backend ignore names that they do not know.
    """

    name: str
    comment: str
    inputs: Sequence[ValueInfo]
    outputs: Sequence[ValueInfo]
    scores: str
    max_batch_size: int
    warm_ups: Sequence[WarmUp]
    parameters: Mapping[str, str]


def encode_config(config: ModelConfig, device: Device) -> str:
    """Return a configuration in the text format of protocol buffers, with an instance group for a device."""
    fields = [
        f"# {config.comment}",
        f"name: {_quote(config.name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quote(MODEL_FILE)}",
        f"max_batch_size: {config.max_batch_size}",
        f"version_policy {{ specific {{ versions: [ {VERSION} ] }} }}",
        f"instance_group [ {{ count: 1 kind: KIND_{device.upper()} }} ]",
    ]
    if config.max_batch_size:
        # No delay: requests that wait at the same time become a batch, and none waits for others to come.
        policy = f"default_queue_policy {{ max_queue_size: {MAX_QUEUED} }}"
        fields.append(f"dynamic_batching {{ max_queue_delay_microseconds: 0 {policy} }}")
    fields += [f"input {_tensor(value, config)}" for value in config.inputs]
    fields += [f"output {_tensor(value, config)}" for value in config.outputs]
    fields += [f"model_warmup {_warm_up(sample, config)}" for sample in config.warm_ups]
    for key, value in config.parameters.items():
        fields.append(f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}")
    return "\n".join([*fields, ""])


def _tensor(value: ValueInfo, config: ModelConfig) -> str:
    """Return an input or output; with batches, Triton adds the batch dimension by itself."""
    sizes = [-1 if isinstance(size, str) else size for size in value.shape]
    parts = [f"name: {_quote(value.name)}", f"data_type: {_DATA_TYPES[value.dtype]}"]
    if config.max_batch_size:
        sizes = sizes[1:]
    # A tensor with one number per frame has no dimension left, which `dims` cannot express.
    parts += [f"dims: {_list(sizes)}"] if sizes else ["dims: [ 1 ]", "reshape { shape: [ ] }"]
    if value.name == config.scores:
        parts.append(f"label_filename: {_quote(LABELS)}")
    return f"{{ {' '.join(parts)} }}"


def _warm_up(sample: WarmUp, config: ModelConfig) -> str:
    (tensor,) = config.inputs
    dims = _list(sample.shape if config.max_batch_size else (1, *sample.shape))
    data = f"data_type: {_DATA_TYPES[tensor.dtype]} dims: {dims} input_data_file: {_quote(sample.file)}"
    entry = f"inputs {{ key: {_quote(tensor.name)} value {{ {data} }} }}"
    return f"{{ name: {_quote(sample.name)} batch_size: {sample.count} {entry} }}"


def _list(numbers: Iterable[int]) -> str:
    return f"[ {', '.join(map(str, numbers))} ]"


def _quote(text: str) -> str:
    """Return a string literal; the escapes of ASCII-only JSON are also those of the text format."""
    return json.dumps(text)
