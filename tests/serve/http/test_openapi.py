"""The OpenAPI description: complete, and true of what the routes answer."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.openapi import openapi_document

from .fake_backend import FakeBackend

schemathesis = pytest.importorskip("schemathesis")

STREAMS = ("/api/v1/events", "/api/v1/live/stream")
MOST_EXAMPLES = 15


def local_app(tmp_path: Path) -> Starlette:
    """Return an application whose requests come from this machine, as the server says it."""
    backend = FakeBackend(tmp_path / "incoming", results=5)
    bundles = tmp_path / "bundles"
    (bundles / "next").mkdir(parents=True)
    return create_app(backend, HttpConfig(max_body_mb=1), bundle_folder=bundles)


class FromThisMachine:
    """The application with the addresses that a server adds and an in-process client does not."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(name, b"localhost" if name == b"host" else value) for name, value in scope["headers"]]
            scope = {**scope, "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 80), "headers": headers}
        await self.app(scope, receive, send)


def test_description_has_exactly_the_routes(tmp_path: Path) -> None:
    app = local_app(tmp_path)
    described = {
        (path, method.upper()) for path, item in openapi_document(HttpConfig())["paths"].items() for method in item
    }
    served = {
        (route.path, method)
        for route in app.routes
        if isinstance(route, Route) and not route.path.startswith(("/v2", "/static/")) and len(route.path) > 1
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert described == served - {("/favicon.ico", "GET")}


def test_every_operation_has_a_name_and_describes_its_errors() -> None:
    document = openapi_document(HttpConfig(max_body_mb=7))
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        assert {"400", "401", "403", "408", "413", "421", "500"} <= set(operation["responses"])
    assert "7 MiB" in document["paths"]["/api/v1/predict"]["post"]["requestBody"]["description"]
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])


def test_schemathesis_finds_no_difference(tmp_path: Path) -> None:
    """Send generated requests, valid and invalid, to every operation that ends by itself."""
    from hypothesis import HealthCheck, Phase, given, settings

    app = FromThisMachine(local_app(tmp_path))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checked = 0
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in STREAMS:
            continue
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=MOST_EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def check(case: Any) -> None:
                nonlocal checked
                checked += 1
                case.call_and_validate()

            try:
                check()
            except Exception as error:
                if "NoSuch" in type(error).__name__ or "Unsatisfiable" in type(error).__name__:
                    continue  # an operation without parameters has no invalid request
                raise
    assert checked > 100


@pytest.mark.parametrize("path", STREAMS)
def test_streams_answer_their_headers(tmp_path: Path, path: str) -> None:
    import httpx

    async def head() -> httpx.Response:
        transport = httpx.ASGITransport(FromThisMachine(local_app(tmp_path)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.head(path)

    answer = asyncio.run(head())
    described = openapi_document(HttpConfig())["paths"][path]["get"]["responses"]["200"]["content"]
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] in described
