"""Errors of a KServe request, which the application answers as ``{"error": "..."}``."""

from __future__ import annotations

import reprlib
from http import HTTPStatus
from typing import Final

from echoquad_serve.http.error_responses import ApiError

__all__ = ["invalid_request", "quote", "too_large"]

_MAX_QUOTED: Final = 60
_SHORT: Final = reprlib.Repr()  # of what is nested a thousand times, too
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MAX_QUOTED
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 8, 2


def invalid_request(message: str) -> ApiError:
    """Return the error of a request that breaks the protocol, or asks for what the model does not have: 400."""
    return ApiError(HTTPStatus.BAD_REQUEST, "E_KSERVE_REQUEST", message)


def too_large(message: str) -> ApiError:
    """Return the error of a request that is larger than a limit: 413."""
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "E_HTTP_BODY_TOO_LARGE", message)


def quote(value: object) -> str:
    """Return what a client sent as a short and printable part of a message."""
    text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
