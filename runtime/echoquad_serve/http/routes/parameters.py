"""Query parameters of the API. An unknown, repeated or invalid one is an error, so that a typing error is noticed."""

from __future__ import annotations

import re
from http import HTTPStatus

from starlette.requests import Request

from echoquad_serve.http.error_responses import ApiError

__all__ = ["MAX_INTEGER", "check_parameters", "integer", "switch"]

MAX_INTEGER = 2**53 - 1
"""Largest integer that JavaScript counts with."""


def check_parameters(request: Request, *known: str) -> None:
    """Return if a request has known parameters only, each once.

    Raises
    ------
    ApiError
        If not: 400.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            raise _error(name[:40], f"the path does not know it; known are: {', '.join(known) or 'none'}")
        if names.count(name) > 1:
            raise _error(name, "it is given twice; give it once")


def integer(request: Request, name: str, *, low: int, high: int = MAX_INTEGER, default: int | None) -> int | None:
    """Return a parameter as an integer; `default` if the request does not have it.

    Raises
    ------
    ApiError
        If it is no integer from `low` to `high`: 400.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    value = int(text) if re.fullmatch(r"[0-9]{1,16}", text) else -1
    if not low <= value <= high:
        raise _error(name, f"expected a whole number from {low} to {high}")
    return value


def switch(request: Request, name: str, *, default: bool) -> bool:
    """Return a parameter that is ``0`` or ``1``; `default` if the request does not have it.

    Raises
    ------
    ApiError
        If it has another value: 400.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if text not in ("0", "1"):
        raise _error(name, "expected 0 or 1")
    return text == "1"


def _error(name: str, message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_PARAMETER", f"parameter {name!r}: {message}")
