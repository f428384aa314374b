"""What the HTTP routes need of the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.records import IncomingObject, Job, Result

__all__ = ["Backend"]


class Backend(Protocol):
    """The service, as the routes see it. Every method may be called from any thread, and may block.

    Attributes
    ----------
    incoming
        The folder for files that are being received, on the file system of the spool.
    """

    @property
    def incoming(self) -> Path:
        """See the class."""
        ...

    def unready_reasons(self) -> Sequence[str]:
        """Return why the service is not ready, such as ``the bundle is being tested``; empty if it is."""
        ...

    def info(self) -> dict[str, Any]:
        """Return the bundle, its contract, the device, provider and precision that run, the self-test, and versions."""
        ...

    def status(self) -> dict[str, Any]:
        """Return the state of intake, queue, destinations, live source and bundle, for the page and for alerts."""
        ...

    def check_room(self, bytes_expected: int = 0) -> None:
        """Return if an object of that size would be accepted now; called before its body is received.

        Raises
        ------
        IntakeError
            If the queue or the disk is full.
        """
        ...

    def submit(self, incoming: IncomingObject) -> Job:
        """Accept an object: on return it is on the disk and in the queue.

        Raises
        ------
        IntakeError
            If the queue or the disk is full.
        """
        ...

    def predict(self, incoming: IncomingObject) -> Future[Result]:
        """Accept an object and return the future of its result, which the store has recorded by then.

        The future raises TimeoutError if the service stops before. Whoever does not wait any more cancels it; the
        object stays in the queue.

        Raises
        ------
        IntakeError
            If the queue or the disk is full, so that the object is not accepted.
        """
        ...

    def result(self, identifier: str) -> Result | None:
        """Return the result of a job; None if there is none, or it is not listed any more."""
        ...

    def results(self, *, before: int | None = None, after: int = 0, limit: int = 100) -> list[Result]:
        """Return results by number: the latest ones below `before`, latest first; with `after`, the next, in order.

        0 is no `after`; a negative one begins with the first result.
        """
        ...

    def subscribe(self, listener: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        """Call `listener` with each event, its name and its data, in any thread; return how to unsubscribe.

        The names are ``result`` (as `Result.to_dict`), ``status`` (as `status`) and ``live`` (the latest
        live decision).
        """
        ...

    def overlay(self, identifier: str, row: int, *, cam: bool) -> bytes:
        """Return the picture of a row of a result with its evidence, as PNG.

        Raises
        ------
        FrameError
            If the frame is not kept any more, or cannot be drawn.
        KeyError
            If there is no such row.
        """
        ...

    def live_frames(self) -> Iterator[bytes]:
        """Yield the latest live frame as JPEG whenever there is a new one; the end is that of the source."""
        ...

    def predictor(self) -> Predictor:
        """Return the predictor of the bundle in use, for requests that bring quadrants or pixels."""
        ...

    def record(self, predictor: Predictor, predictions: Sequence[Prediction], sender: str) -> None:
        """Count and audit decisions of a predictor that no job has: those of a request that brought pixels."""
        ...

    def load_bundle(self, folder: Path) -> dict[str, Any]:
        """Verify, test and warm a bundle up beside the one in use, then swap; return `info`.

        Raises
        ------
        EchoQuadError
            If the bundle is refused; the one in use stays.
        """
        ...

    def roll_back(self) -> dict[str, Any]:
        """Swap back to the bundle before the one in use; return `info`.

        Raises
        ------
        EchoQuadError
            If there is none.
        """
        ...

    def retry(self, destination: str) -> int:
        """Send again what a destination has refused and what was postponed; return how many results that is.

        Raises
        ------
        KeyError
            If there is no such destination.
        """
        ...

    def metrics(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        ...
