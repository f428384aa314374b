"""What all routes share: the service, the limits, and the threads for blocking calls."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request

from echoquad_serve.http.backend import Backend
from echoquad_serve.http.limits import Limits
from echoquad_serve.http.open_streams import OpenStreams
from echoquad_serve.http.thread_pool import ThreadPool

__all__ = ["Context", "context_of"]


class Context:
    """What all routes share.

    Attributes
    ----------
    backend
        The service.
    limits
        Limits of requests.
    bundle_folder
        The folder that holds the bundles a client may choose from; None for none.
    predictions
        Threads of requests that bring an object.
    tensors
        Threads of requests that bring tensors of KServe clients.
    reads
        Threads that read and draw results.
    health
        Threads of the state and the metrics, which must answer while all others are busy.
    bundles
        The thread that changes the bundle.
    events, live
        Open event streams, and viewers of the live source.
    """

    def __init__(self, backend: Backend, limits: Limits, bundle_folder: Path | None) -> None:
        self.backend = backend
        self.limits = limits
        self.bundle_folder = bundle_folder
        self.predictions = ThreadPool("predict", limits.predictions)
        self.tensors = ThreadPool("tensors", limits.tensor_threads, limits.tensors)
        self.reads = ThreadPool("read", limits.read_threads, limits.reads)
        self.health = ThreadPool("health", 2, 64)
        self.bundles = ThreadPool("bundle", 1)
        self.events = OpenStreams(limits.event_streams)
        self.live = OpenStreams(limits.live_streams)

    def end_streams(self) -> None:
        """End all open streams, which would otherwise keep the server from stopping."""
        self.events.end()
        self.live.end()

    def close(self) -> None:
        """End streams and threads."""
        self.end_streams()
        for pool in (self.predictions, self.tensors, self.reads, self.health, self.bundles):
            pool.close()


def context_of(request: Request) -> Context:
    """Return the context of the application that serves a request."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
