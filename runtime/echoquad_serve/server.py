"""The server: a service behind its HTTP listener, from start to a stop in good order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvicorn

from echoquad_serve.config import ServiceConfig
from echoquad_serve.http.app import create_app
from echoquad_serve.http.listener import check_listener, open_listener, uvicorn_config
from echoquad_serve.monitoring.json_logging import configure_logging
from echoquad_serve.service import BedsideService
from echoquad_serve.systemd_notify import feed_watchdog, notify_systemd

__all__ = ["run"]

_POLL_S: Final = 0.1


class _Server(uvicorn.Server):
    """uvicorn's server, with a watchdog in its event loop.

    Not uvicorn's own `callback_notify`: it goes by the time of day, and a clock that is set back would silence it.
    """

    def __init__(self, config: uvicorn.Config, hang_reason: Callable[[], str | None]) -> None:
        super().__init__(config)
        self._hang_reason = hang_reason

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, and feed the watchdog of systemd meanwhile."""
        watchdog = asyncio.create_task(feed_watchdog(self._hang_reason), name="echoquad-watchdog")
        try:
            await super().serve(sockets)
        finally:
            watchdog.cancel()


def run(bundle: Path, config: ServiceConfig, on_ready: Callable[[str], object] = lambda _: None) -> None:
    """Run a service until SIGINT or SIGTERM. Its logs go to the standard error, as JSON lines.

    Parameters
    ----------
    bundle
        The bundle to begin with.
    config
        The configuration.
    on_ready
        Called with the address of the page once the service is ready.

    Raises
    ------
    EchoQuadError
        If the configuration, the queue or the bundle cannot be used.
    """
    check_listener(config.http)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_listener(config.http))
        service = stack.enter_context(contextlib.closing(BedsideService(bundle, config)))
        stack.callback(_notify_stopping, service)  # also after a signal, which uvicorn raises again
        stack.callback(configure_logging(sys.stderr))
        stack.callback(service.metrics_registry.count_errors())
        app = create_app(
            service,
            config.http,
            bundle_folder=config.model.bundle_folder,
            observe=lambda _, route, status, seconds: service.metrics_registry.observe_http(route, status, seconds),
        )
        server = _Server(uvicorn_config(app, config.http), service.hang_reason)
        notify_systemd("STATUS=checking and testing the bundle")
        service.start()
        scheme = "http" if config.http.tls is None else "https"
        address = f"{scheme}://{config.http.host}:{listener.getsockname()[1]}/"

        def watch() -> None:
            """Report readiness once, and end the server if the first bundle cannot be used."""
            while not server.should_exit:
                if service.fault is not None:
                    server.should_exit = True
                elif server.started and not service.unready_reasons():
                    notify_systemd("READY=1", f"STATUS=ready: {address}")
                    on_ready(address)
                    return
                threading.Event().wait(_POLL_S)

        threading.Thread(target=watch, name="echoquad-ready", daemon=True).start()
        server.run(sockets=[listener])
        if service.fault is not None:
            raise service.fault


def _notify_stopping(service: BedsideService) -> None:
    fault = service.fault
    notify_systemd("STOPPING=1", "STATUS=stopping" if fault is None else f"STATUS=failed with {fault.code}")
