"""``/api/v1/results``: the results that the store lists, and their pictures."""

from __future__ import annotations

import re
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from echoquad_runtime.errors import FrameError
from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import context_of
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.routes.parameters import check_parameters, integer, switch

__all__ = ["MAX_LIMIT", "overlay", "result", "results"]

MAX_LIMIT = 500
"""Results in one answer, at most."""


async def results(request: Request) -> Response:
    """Answer the latest results, or those after a number.

    Raises
    ------
    ApiError
        If a parameter is invalid.
    """
    check_parameters(request, "limit", "before", "after")
    limit = integer(request, "limit", low=1, high=MAX_LIMIT, default=100)
    before = integer(request, "before", low=1, default=None)
    after = integer(request, "after", low=0, default=None)
    assert limit is not None
    context = context_of(request)
    body = await context.reads.call(_page, context.backend, limit, before, after)
    return Response(body, media_type="application/json")


def _page(backend: Backend, limit: int, before: int | None, after: int | None) -> bytes:
    # To the service, 0 is no `after`; numbers begin at 1.
    found = backend.results(before=before, after=0 if after is None else after or -1, limit=limit)
    more = found[-1].number if len(found) == limit else None
    return encode_json({"results": [one.to_dict() for one in found], "next": more})


async def result(request: Request) -> Response:
    """Answer one result.

    Raises
    ------
    ApiError
        If there is none: 404.
    """
    check_parameters(request)
    context = context_of(request)
    body = await context.reads.call(_one, context.backend, _identifier(request))
    return Response(body, media_type="application/json")


def _one(backend: Backend, identifier: str) -> bytes:
    found = backend.result(identifier)
    if found is None:
        raise _not_found()
    return encode_json(found.to_dict())


async def overlay(request: Request) -> Response:
    """Answer the picture of a row with its evidence, as PNG.

    Raises
    ------
    ApiError
        If there is no such row, or its frame is not kept any more: 404.
    """
    check_parameters(request, "row", "cam")
    row = integer(request, "row", low=0, default=0)
    assert row is not None
    context = context_of(request)
    cam = switch(request, "cam", default=False)
    png = await context.reads.call(_draw, context.backend, _identifier(request), row, cam)
    return Response(png, media_type="image/png")


def _draw(backend: Backend, identifier: str, row: int, cam: bool) -> bytes:
    try:
        return backend.overlay(identifier, row, cam=cam)
    except KeyError as error:
        raise ApiError(
            HTTPStatus.NOT_FOUND, "E_RESULT_NOT_FOUND", "there is no such row; /api/v1/results lists results"
        ) from error
    except FrameError as error:
        raise ApiError(HTTPStatus.NOT_FOUND, error.code, str(error)) from error


def _identifier(request: Request) -> str:
    identifier = request.path_params["id"]
    if not re.fullmatch(r"[0-9a-f]{32}", identifier):
        raise _not_found()
    return str(identifier)


def _not_found() -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND,
        "E_RESULT_NOT_FOUND",
        "there is no such result: the object still waits, or the result is not listed any more",
    )
