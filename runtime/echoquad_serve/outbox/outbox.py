"""The outbox: a thread for each destination, so that one that hangs holds no other up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from echoquad_serve.config import DestinationConfig
from echoquad_serve.outbox.delivery_worker import DeliveryStore, DeliveryWorker
from echoquad_serve.records import Delivery, Destination

__all__ = ["Outbox"]

_CLOSE_S: Final = 1.8


class Outbox:
    """Sends each result to each destination.

    Everything that must survive a crash is in the store: a result that was sent, and not yet recorded as delivered, is
    sent again, and destinations make a repeat the same as one delivery.

    Parameters
    ----------
    store
        The deliveries that are due, and what became of them.
    destinations
        The configuration of each destination, and the destination, which `close` closes.
    clock
        Returns the Unix time.
    on_outcome
        Called in the destination's thread after each attempt with the destination's name, the delivery, and the error;
        None if it was delivered. A result of an origin that the destination does not want is no attempt.
    """

    def __init__(
        self,
        store: DeliveryStore,
        destinations: Sequence[tuple[DestinationConfig, Destination]],
        clock: Callable[[], float] = time.time,
        on_outcome: Callable[[str, Delivery, Exception | None], None] = lambda *_: None,
    ) -> None:
        self._store = store
        self._workers = {
            config.name: DeliveryWorker(config, destination, store, clock, on_outcome)
            for config, destination in destinations
        }

    def start(self) -> None:
        """Start the threads."""
        for worker in self._workers.values():
            worker.start()

    def close(self) -> None:
        """End the threads and close the destinations, within two seconds even if one of them hangs.

        What was not delivered stays in the store. The thread of a destination that hangs ends when its call returns.
        """
        for worker in self._workers.values():
            worker.stop()
        closers = [
            threading.Thread(target=worker.destination.close, name=f"echoquad-outbox-close-{name}", daemon=True)
            for name, worker in self._workers.items()
        ]
        for closer in closers:
            closer.start()
        end = time.monotonic() + _CLOSE_S
        for worker in self._workers.values():
            worker.join(max(0.0, end - time.monotonic()))
        for closer in closers:
            closer.join(max(0.0, end - time.monotonic()))

    def status(self) -> list[dict[str, Any]]:
        """Return the state of each destination; see `DeliveryWorker.status`."""
        stored = self._store.status().get("destinations", {})
        return [worker.status(stored.get(name, {})) for name, worker in self._workers.items()]

    def retry_refused(self, destination: str) -> int:
        """Send at once what a destination has refused and what was postponed; return how many results that is.

        Raises
        ------
        KeyError
            If there is no such destination.
        """
        worker = self._workers[destination]
        count = self._store.send_again(destination)
        worker.wake()
        return count
