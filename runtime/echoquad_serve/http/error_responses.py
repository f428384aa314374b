"""Errors as JSON: ``{"error": {"code", "message"}}``, and ``{"error": "..."}`` for the paths of KServe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from echoquad_runtime.errors import (
    BundleNotFoundError,
    ConfigError,
    DeviceUnavailableError,
    EchoQuadError,
    FrameError,
    InputNotFoundError,
    UsageError,
)
from echoquad_serve.errors import IntakeError, QueueFullError
from echoquad_serve.http.json_encoding import encode_json

__all__ = ["ApiError", "busy_error", "echoquad_error_response", "error_response", "http_error_response", "refusal"]

_CODES: dict[int, str] = {
    HTTPStatus.NOT_FOUND: "E_HTTP_NOT_FOUND",
    HTTPStatus.METHOD_NOT_ALLOWED: "E_HTTP_METHOD",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "E_HTTP_BODY_TOO_LARGE",
}

_STATUSES: tuple[tuple[type[EchoQuadError], HTTPStatus], ...] = (
    (QueueFullError, HTTPStatus.TOO_MANY_REQUESTS),
    (IntakeError, HTTPStatus.SERVICE_UNAVAILABLE),
    (FrameError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (BundleNotFoundError, HTTPStatus.NOT_FOUND),
    (InputNotFoundError, HTTPStatus.NOT_FOUND),
    (ConfigError, HTTPStatus.BAD_REQUEST),
    (UsageError, HTTPStatus.BAD_REQUEST),
    (DeviceUnavailableError, HTTPStatus.SERVICE_UNAVAILABLE),
)


class ApiError(HTTPException):
    """A request is refused.

    Parameters
    ----------
    status
        Status code of the answer.
    code
        Stable name of the error.
    message
        One line: what is wrong, what was expected, how to fix it.
    headers
        Further headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.code = code


def busy_error(message: str, *, status: int = HTTPStatus.TOO_MANY_REQUESTS, retry_after: float = 1.0) -> ApiError:
    """Return the error of a request that may be repeated after some seconds."""
    return ApiError(status, "E_HTTP_BUSY", message, {"Retry-After": _seconds(retry_after)})


def error_response(
    path: str, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error in the form of the path's protocol."""
    kserve = path == "/v2" or path.startswith("/v2/")
    error = message if kserve else {"code": code, "message": message}
    return Response(encode_json({"error": error}), status, headers, "application/json")


async def http_error_response(request: Request, error: Exception) -> Response:
    """Return the answer to an `HTTPException`: this package's, or one of the router.

    A coroutine, since Starlette would run a function in a thread of its own pool, and refusals must be cheap.
    """
    assert isinstance(error, HTTPException)
    return refusal(request, error)


def refusal(request: Request, error: HTTPException) -> Response:
    """Return the answer to a refused request."""
    status = error.status_code
    if isinstance(error, ApiError):
        code, message = error.code, str(error.detail)
    elif status == HTTPStatus.NOT_FOUND and error.detail == HTTPStatus.NOT_FOUND.phrase:
        code, message = _CODES[status], "there is nothing at this path; /openapi.json lists the paths"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        code, message = _CODES[status], f"the path has other methods: {(error.headers or {}).get('Allow', 'none')}"
    else:
        code, message = _CODES.get(status, f"E_HTTP_{status}"), str(error.detail)
    return error_response(request.url.path, status, code, message, error.headers)


async def echoquad_error_response(request: Request, error: Exception) -> Response:
    """Return the answer to an error that EchoQuad raises on purpose, with its code and its message."""
    assert isinstance(error, EchoQuadError)
    status = next((status for kind, status in _STATUSES if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
    headers = {"Retry-After": _seconds(error.retry_after)} if isinstance(error, IntakeError) else None
    return error_response(request.url.path, status, error.code, str(error), headers)


def _seconds(value: float) -> str:
    return str(max(1, math.ceil(value)))
