"""Routes of operation: live, ready, info, status, metrics, and the change of the bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from echoquad_runtime.errors import BundleNotFoundError, EchoQuadError
from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import context_of
from echoquad_serve.http.error_responses import ApiError, busy_error, error_response
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.routes.parameters import check_parameters

__all__ = ["info", "live", "load_bundle", "metrics", "ready", "retry", "roll_back", "status"]

_MAX_JSON = 64 * 1024
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def live(request: Request) -> Response:
    """Answer that the process serves requests."""
    check_parameters(request)
    return Response(b'{"live":true}', media_type="application/json")


async def ready(request: Request) -> Response:
    """Answer whether objects are decided, and why not: 503."""
    check_parameters(request)
    context = context_of(request)
    reasons = list(await context.health.call(context.backend.unready_reasons))
    if not reasons:
        return Response(b'{"ready":true,"reasons":[]}', media_type="application/json")
    body = encode_json({"ready": False, "reasons": reasons})
    return Response(body, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "5"}, "application/json")


async def info(request: Request) -> Response:
    """Answer what runs on what."""
    check_parameters(request)
    context = context_of(request)
    return await context.health.call(_json_of, context.backend.info)


async def status(request: Request) -> Response:
    """Answer the state of intake, queue, destinations, live source and bundle."""
    check_parameters(request)
    context = context_of(request)
    return await context.health.call(_json_of, context.backend.status)


async def metrics(request: Request) -> Response:
    """Answer all metrics in the text format of Prometheus."""
    check_parameters(request)
    context = context_of(request)
    body = await context.health.call(context.backend.metrics)
    return Response(body, headers={"Content-Type": _METRICS_TYPE})


async def load_bundle(request: Request) -> Response:
    """Load the bundle whose folder the request names, and swap to it.

    Raises
    ------
    ApiError
        If the request is refused, or another one changes the bundle: 409.
    """
    check_parameters(request)
    name = await _folder_name(request)
    context = context_of(request)
    load = partial(_load, context.backend, context.bundle_folder, name)
    return await _change_bundle(request, load, HTTPStatus.UNPROCESSABLE_ENTITY)


async def roll_back(request: Request) -> Response:
    """Swap back to the bundle before the one in use.

    Raises
    ------
    ApiError
        If another request changes the bundle: 409.
    """
    check_parameters(request)
    return await _change_bundle(request, context_of(request).backend.roll_back, HTTPStatus.CONFLICT)


async def retry(request: Request) -> Response:
    """Send again what a destination has refused and what was postponed.

    Raises
    ------
    ApiError
        If there is no such destination: 404.
    """
    check_parameters(request)
    context = context_of(request)
    return await context.reads.call(_retry, context.backend, request.path_params["name"])


def _retry(backend: Backend, name: str) -> Response:
    try:
        return Response(encode_json({"sent_again": backend.retry(name)}), media_type="application/json")
    except KeyError as error:
        message = "there is no such destination; /api/v1/status lists them"
        raise ApiError(HTTPStatus.NOT_FOUND, "E_HTTP_NOT_FOUND", message) from error


async def _change_bundle(request: Request, change: Callable[[], dict[str, Any]], refused: HTTPStatus) -> Response:
    context = context_of(request)
    try:
        with context.bundles.hold():
            return await context.bundles.run(_json_of, change)
    except ApiError as error:
        if error.status_code != HTTPStatus.TOO_MANY_REQUESTS:
            raise
        message = "another request changes the bundle; repeat the request once it has ended"
        raise busy_error(message, status=HTTPStatus.CONFLICT, retry_after=10.0) from error
    except EchoQuadError as error:
        code = HTTPStatus.NOT_FOUND if isinstance(error, BundleNotFoundError) else refused
        return error_response(request.url.path, code, error.code, str(error))


def _load(backend: Backend, root: Path | None, name: str) -> dict[str, Any]:
    """Load a bundle. The name is compared with those in the folder, and no path is made of it."""
    if root is None:
        raise ApiError(
            HTTPStatus.CONFLICT, "E_CONFIG", "model.bundle_folder is not configured, and bundles are loaded from there"
        )
    try:
        with os.scandir(root) as entries:
            folder = next((Path(entry.path) for entry in entries if entry.name == name and entry.is_dir()), None)
    except OSError as error:
        raise BundleNotFoundError("the configured bundle folder cannot be read; check its path and its mode") from error
    if folder is None:
        raise BundleNotFoundError("the configured bundle folder has no such folder; expected the name of one in it")
    return backend.load_bundle(folder)


async def _folder_name(request: Request) -> str:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "E_HTTP_CONTENT_TYPE", "expected Content-Type: application/json"
        )
    body = bytearray()
    try:
        async for data in request.stream():
            body += data
            if len(body) > _MAX_JSON:
                message = f"the body is too large; expected at most {_MAX_JSON} bytes"
                raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "E_HTTP_BODY_TOO_LARGE", message)
    except ClientDisconnect as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_BODY_CUT", "the connection was closed early") from error
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or list(values) != ["folder"] or not isinstance(values["folder"], str):
        message = 'the body is not understood; expected {"folder": "NAME"}'
        raise ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_BODY", message)
    return values["folder"]


def _json_of(function: Callable[[], dict[str, Any]]) -> Response:
    return Response(encode_json(function()), media_type="application/json")
