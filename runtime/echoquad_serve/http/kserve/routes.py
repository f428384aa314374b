"""The routes below ``/v2``."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from echoquad_runtime._version import __version__
from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import Context, context_of
from echoquad_serve.http.error_responses import ApiError, refusal
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.kserve.content_coding import Coding, accepted_coding, inflate, request_coding
from echoquad_serve.http.kserve.errors import invalid_request, too_large
from echoquad_serve.http.kserve.infer_request import parse_request
from echoquad_serve.http.kserve.infer_response import infer_response
from echoquad_serve.http.kserve.inference import predict
from echoquad_serve.http.kserve.served_model import ModelFinder, ServedModel
from echoquad_serve.http.kserve.signature import input_metadata, output_metadata, output_tensors
from echoquad_serve.http.routes.parameters import check_parameters

__all__ = ["kserve_routes"]

_MEDIA_TYPES: Final = ("", "application/json", "application/octet-stream")
_HEADER: Final = "inference-header-content-length"


def kserve_routes(backend: Backend) -> list[Route]:
    """Return the routes of the protocol for a service."""
    endpoints = _Endpoints(ModelFinder(backend))
    model = "/v2/models/{model}"
    routes = [
        Route("/v2", endpoints.server),
        Route("/v2/health/live", endpoints.live),
        Route("/v2/health/ready", endpoints.ready),
    ]
    for path in (model, f"{model}/versions/{{version}}"):
        routes += [
            Route(path, endpoints.model),
            Route(f"{path}/ready", endpoints.model_ready),
            Route(f"{path}/infer", endpoints.infer, methods=["POST"]),
        ]
    return routes


class _Endpoints:
    """What answers; each method is that of a path."""

    def __init__(self, finder: ModelFinder) -> None:
        self._finder = finder

    async def server(self, request: Request) -> Response:
        """Answer what the server is."""
        check_parameters(request)
        return _json({"name": "echoquad", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        """Answer that the process serves requests."""
        check_parameters(request)
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Answer whether frames are decided, and why not: 503."""
        check_parameters(request)
        await context_of(request).health.call(self._finder.check_ready)
        return _json({"ready": True})

    async def model(self, request: Request) -> Response:
        """Answer the inputs and outputs of a model."""
        check_parameters(request)
        model = await self._find(request)
        return _json(
            {
                "name": model.name,
                "versions": [model.version],
                "platform": "onnxruntime_onnx",
                "inputs": input_metadata(model.contract),
                "outputs": output_metadata(model),
                "properties": model.properties,
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """Answer whether a model decides frames: 404 or 503 if not."""
        check_parameters(request)
        model = await self._find(request)
        return _json({"name": model.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Decide the frames or quadrants in the body.

        Raises
        ------
        ApiError
            If the request is refused, or there is no result in time: 504.
        """
        check_parameters(request)
        coding = _check_headers(request)
        context = context_of(request)
        with context.tensors.hold():
            model = await self._find(request)  # before the body is received
            body = await _receive(request, context.limits.tensor_bytes)
            seconds = context.limits.predict_s
            try:
                async with asyncio.timeout(seconds):
                    return await context.tensors.run(_infer, model, body, coding, request, context)
            except TimeoutError as error:
                raise ApiError(
                    HTTPStatus.GATEWAY_TIMEOUT,
                    "E_RESULT_TIMEOUT",
                    f"there is no result after {seconds:g} s; send fewer frames, or repeat the request later",
                    {"Retry-After": "5"},
                ) from error
            finally:
                body.clear()  # a thread may hang, and the call still wait for it

    async def _find(self, request: Request) -> ServedModel:
        names = request.path_params
        return await context_of(request).health.call(self._finder.find, names["model"], names.get("version"))


def _infer(model: ServedModel, body: list[bytearray], coding: Coding, request: Request, context: Context) -> Response:
    """Read, decide and answer: the blocking part. The body leaves its list, so that it is freed once it is inflated.

    A refusal is answered here, and not raised: its traceback would keep the whole request in memory for a while.
    """
    limits = context.limits
    try:
        content = inflate(body.pop(), coding, limits.tensor_bytes)
        parsed = parse_request(content, request.headers.get(_HEADER), model, limits)
        predictions = predict(model, parsed)
        context.backend.record(model.predictor, predictions, request.client.host if request.client else "")
        tensors = output_tensors(model, predictions, list(parsed.outputs))
        return infer_response(model, parsed, tensors, accepted_coding(request.headers.get("accept-encoding", "")))
    except ApiError as error:
        return refusal(request, error)


async def _receive(request: Request, limit: int) -> list[bytearray]:
    """Return the body in a list."""
    refused = f"the body is too large; expected at most {limit} bytes; send fewer frames"
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large(refused)
    body = bytearray()
    try:
        async for data in request.stream():
            body += data
            if len(body) > limit:
                raise too_large(refused)
    except ClientDisconnect as error:
        raise invalid_request("the connection was closed early") from error
    return [body]


def _check_headers(request: Request) -> Coding:
    """Return the coding of the body, if its type is one of the protocol."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES:
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "E_HTTP_CONTENT_TYPE",
            "the Content-Type is not one of the protocol; expected application/json, or application/octet-stream if "
            "binary data follow the JSON",
        )
    for name in (_HEADER, "content-encoding"):
        if len(request.headers.getlist(name)) > 1:
            raise invalid_request(f"header {name} is given twice; give it once")
    return request_coding(request.headers.get("content-encoding", ""))


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_json(value), media_type="application/json")
