"""Compression of bodies, both ways: ``gzip``, and ``deflate``, which is the zlib format (RFC 9110)."""

from __future__ import annotations

import zlib
from http import HTTPStatus
from typing import Final, Literal, cast

from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.kserve.errors import invalid_request, too_large

__all__ = ["Coding", "accepted_coding", "compress", "inflate", "request_coding"]

Coding = Literal["gzip", "deflate", "identity"]

_WINDOW_BITS: Final[dict[Coding, int]] = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_LEVEL: Final = 1  # an answer is short, and its numbers hardly shrink


def request_coding(header: str) -> Coding:
    """Return the coding that ``Content-Encoding`` names; an empty header is ``identity``.

    Raises
    ------
    ApiError
        If it is another one, or more than one: 415.
    """
    name = header.strip().lower() or "identity"
    name = name.removeprefix("x-")
    if name not in ("gzip", "deflate", "identity"):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "E_HTTP_CONTENT_TYPE",
            "the Content-Encoding is not known; expected gzip, deflate or none",
            {"Accept-Encoding": "gzip, deflate, identity"},
        )
    return cast("Coding", name)


def accepted_coding(header: str) -> Coding:
    """Return the coding for an answer: the one that ``Accept-Encoding`` prefers, gzip if it is all the same."""
    weights: dict[str, float] = {}
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        text = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = 0.0
    codings: tuple[Coding, ...] = ("gzip", "deflate")
    best = max(codings, key=lambda name: weights.get(name, weights.get("*", 0.0)))
    weight = weights.get(best, weights.get("*", 0.0))
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else "identity"


def inflate(data: bytes | bytearray, coding: Coding, limit: int) -> bytes | bytearray:
    """Return the content of a compressed body.

    Parameters
    ----------
    data
        The body.
    coding
        Its coding.
    limit
        Size of the largest content in bytes. Nothing beyond it is inflated.

    Raises
    ------
    ApiError
        If the content is larger: 413. If the body is damaged or truncated, or goes on after its end: 400.
    """
    if coding == "identity":
        return data
    inflater = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        content = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise invalid_request(
            f"the body is no {coding} data, or is damaged; compress it again, or send it plain"
        ) from error
    if len(content) > limit:
        raise too_large(f"the inflated body is too large; expected at most {limit} bytes; send fewer frames")
    if not inflater.eof or inflater.unused_data:
        what = "goes on after its end" if inflater.eof else "is truncated"
        raise invalid_request(f"the {coding} body {what}; expected one complete {coding} stream")
    return content


def compress(data: bytes, coding: Coding) -> bytes:
    """Return a body in a coding."""
    if coding == "identity":
        return data
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    return deflater.compress(data) + deflater.flush()
