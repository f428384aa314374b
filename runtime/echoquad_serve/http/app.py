"""The application: every route of the page and the API, and what protects them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from echoquad_runtime.errors import EchoQuadError
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import Context
from echoquad_serve.http.error_responses import echoquad_error_response, http_error_response
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.kserve import kserve_routes
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.listener import read_token
from echoquad_serve.http.openapi import openapi_document
from echoquad_serve.http.protection.body_limits import BodyLimits
from echoquad_serve.http.protection.request_checks import RequestChecks
from echoquad_serve.http.protection.request_guard import Observer, RequestGuard
from echoquad_serve.http.routes import events, live_view, operation, predictions, results
from echoquad_serve.http.static_page import page_routes

__all__ = ["create_app"]


def create_app(
    backend: Backend,
    config: HttpConfig,
    *,
    bundle_folder: Path | None = None,
    limits: Limits | None = None,
    observe: Observer | None = None,
) -> Starlette:
    """Return the application of a service.

    Parameters
    ----------
    backend
        The service.
    config
        The listener.
    bundle_folder
        The folder that holds the bundles a client may choose from; None for none.
    limits
        Limits of requests; None for the default.
    observe
        Called after each request with its method, its route, its status code and its seconds.

    Raises
    ------
    ConfigError
        If the token file is not usable.
    """
    limits = limits or Limits()
    context = Context(backend, limits, bundle_folder)
    document = encode_json(openapi_document(config))

    async def openapi(_: Request) -> Response:
        return Response(document, media_type="application/json")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        context.close()

    routes = [
        Route("/api/v1/live", operation.live),
        Route("/api/v1/ready", operation.ready),
        Route("/api/v1/info", operation.info),
        Route("/api/v1/status", operation.status),
        Route("/api/v1/predict", predictions.predict, methods=["POST"]),
        Route("/api/v1/results", results.results),
        Route("/api/v1/results/{id}", results.result),
        Route("/api/v1/results/{id}/overlay", results.overlay),
        Route("/api/v1/events", events.events),
        Route("/api/v1/live/stream", live_view.live_stream),
        Route("/api/v1/bundle", operation.load_bundle, methods=["POST"]),
        Route("/api/v1/bundle/rollback", operation.roll_back, methods=["POST"]),
        Route("/api/v1/destinations/{name}/retry", operation.retry, methods=["POST"]),
        Route("/metrics", operation.metrics),
        Route("/openapi.json", openapi),
        *page_routes(),
        *kserve_routes(backend),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(RequestGuard, observe),
            Middleware(RequestChecks, config, limits, read_token(config)),
            Middleware(BodyLimits, config.max_body_mb * 1024 * 1024, limits),
        ],
        exception_handlers={HTTPException: http_error_response, EchoQuadError: echoquad_error_response},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would repeat the Host header
    app.state.context = context
    return app
