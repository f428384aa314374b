"""The answer to an inference request: JSON, and the binary data behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.kserve.content_coding import Coding, compress
from echoquad_serve.http.kserve.infer_request import InferRequest
from echoquad_serve.http.kserve.served_model import ServedModel
from echoquad_serve.http.kserve.tensors import OutputTensor

__all__ = ["infer_response"]


def infer_response(
    model: ServedModel, request: InferRequest, tensors: Sequence[OutputTensor], coding: Coding
) -> Response:
    """Return the answer with some outputs, in a coding.

    The header ``Inference-Header-Content-Length`` counts bytes of the plain body, as Triton's does.
    """
    outputs, binary = [], []
    for tensor in tensors:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if request.outputs[tensor.name]:
            binary.append(tensor.to_binary())
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = tensor.to_json()
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        answer["id"] = request.id
    answer |= {"parameters": model.parameters, "outputs": outputs}
    header = encode_json(answer)
    headers = {"Vary": "Accept-Encoding"}
    if binary:
        headers["Inference-Header-Content-Length"] = str(len(header))
    if coding != "identity":
        headers["Content-Encoding"] = coding
    media_type = "application/octet-stream" if binary else "application/json"
    return Response(compress(b"".join([header, *binary]), coding), headers=headers, media_type=media_type)
