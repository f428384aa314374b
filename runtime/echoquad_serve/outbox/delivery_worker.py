"""The thread of a destination: takes what is due, delivers it, and waits longer after each failure."""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, Protocol

from echoquad_runtime.errors import EchoQuadError
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.records import Delivery, Destination

__all__ = ["DeliveryStore", "DeliveryWorker", "back_off"]

_LOGGER: Final = logging.getLogger("echoquad_serve.outbox")

_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 300.0
_LONGEST_RETRY_AFTER_S: Final = 3600.0  # a destination that asks for more is tried once an hour all the same
_IN_ORDER_ATTEMPTS: Final = 4
_BATCH: Final = 8
_IDLE_WAIT_S: Final = 1.0  # also the longest that `close` waits for an idle thread
_SHORTEST_WAIT_S: Final = 0.05
_MAX_ERROR_CHARACTERS: Final = 300


class DeliveryStore(Protocol):
    """What the outbox needs of the store. Every method may be called from any thread."""

    def due(self, destination: str, now: float, limit: int) -> list[Delivery]:
        """Return the deliveries that may be sent at the Unix time `now`, in the order of their results' numbers."""
        ...

    def delivered(self, destination: str, result_id: str) -> None:
        """Record that the destination has a result."""
        ...

    def postpone(self, destination: str, result_id: str, retry_at: float, error: str) -> None:
        """Record an attempt without success; the delivery is due again at the Unix time `retry_at`."""
        ...

    def refused(self, destination: str, result_id: str, error: str) -> None:
        """Record that the destination refuses a result. It is kept, and not due any more."""
        ...

    def send_again(self, destination: str) -> int:
        """Make everything that the destination has refused, or that was postponed, due; return how many results."""
        ...

    def wait_due(self, destination: str, timeout: float) -> None:
        """Wait until something may be due, at most `timeout` seconds."""
        ...

    def status(self) -> dict[str, Any]:
        """Return a dict whose ``destinations`` has ``waiting``, ``refused``, ``last_error`` of each destination."""
        ...


def back_off(failures: int) -> float:
    """Return the seconds to wait after a number of failures in a row, from 1: doubled each time, with jitter.

    The jitter, half of the time at most, keeps the carts of a hospital from trying all at once when a server is back.
    """
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(failures, 20))
    return max(_FIRST_WAIT_S, random.uniform(longest / 2, longest))


class DeliveryWorker:
    """Delivers to one destination, in a thread of its own.

    Results go in order. After a failure the whole destination rests, and the same result is tried first. One that has
    failed several times lets others pass in between, so that a result which the destination cannot digest does not hold
    up all that follow.

    Parameters
    ----------
    config
        The destination's configuration.
    destination
        Where to deliver. `close` closes it.
    store
        What is due, and what became of it.
    clock
        Returns the Unix time.
    on_outcome
        Called after each attempt with the name, the delivery, and the error; None if it was delivered.
    """

    def __init__(
        self,
        config: DestinationConfig,
        destination: Destination,
        store: DeliveryStore,
        clock: Callable[[], float],
        on_outcome: Callable[[str, Delivery, Exception | None], None],
    ) -> None:
        self.config, self.destination = config, destination
        self._store, self._clock, self._on_outcome = store, clock, on_outcome
        self._thread = threading.Thread(target=self._run, name=f"echoquad-outbox-{config.name}", daemon=True)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._failures = 0  # in a row
        self._paused_until = 0.0  # monotonic
        self._attempt_began: float | None = None
        self._error = self._refusal = ""
        self._faults = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end. An attempt in progress is not interrupted."""
        self._stopping.set()
        self._wake.set()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread, and return whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def wake(self) -> None:
        """Try at once, whatever the back-off."""
        self._paused_until = 0.0
        self._wake.set()

    def status(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the destination, given the store's figures on it.

        ``ok`` is False after a failed attempt, while anything is refused, and while an attempt takes too long.
        ``sending_s`` is for how many seconds the current attempt has been going on, ``faults`` how many errors in
        EchoQuad itself the thread has survived.
        """
        began = self._attempt_began
        sending = 0.0 if began is None else time.monotonic() - began
        waiting, refused = int(stored.get("waiting", 0)), int(stored.get("refused", 0))
        kept = (refused and self._refusal) or ((waiting or refused) and stored.get("last_error"))
        error = self._error or kept or ""
        hangs = sending > self.config.timeout_s + 1.0
        if hangs and not self._error:
            error = f"the destination has not answered for {sending:.0f} s; check it and the network"
        return {
            "name": self.config.name,
            "type": self.config.type,
            "waiting": waiting,
            "refused": refused,
            "last_error": error or None,
            "note": getattr(self.destination, "note", ""),
            "ok": not (self._failures or refused or hangs),
            "sending_s": round(sending, 1),
            "faults": self._faults,
        }

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                pause = self._paused_until - time.monotonic()
                if pause > 0:
                    self._wake.wait(pause)
                    self._wake.clear()
                else:
                    self._send_due()
            except BaseException as error:  # a full disk, a fault in the store: the thread must go on
                if not self._stopping.is_set():  # the store may be closed while an attempt hangs
                    self._count_fault("the outbox", error)
                    self._rest(f"unexpected {type(error).__name__}", back_off(self._failures + 1))

    def _send_due(self) -> None:
        deliveries = self._store.due(self.config.name, self._clock(), _BATCH)
        for delivery in deliveries:
            if self._stopping.is_set() or not self._send(delivery):
                return
        if not deliveries:
            began = time.monotonic()
            self._store.wait_due(self.config.name, _IDLE_WAIT_S)
            if time.monotonic() - began < _SHORTEST_WAIT_S:  # it may return early for what is postponed
                self._stopping.wait(_SHORTEST_WAIT_S)

    def _send(self, delivery: Delivery) -> bool:
        """Try a delivery once, and return whether the destination can take the next one now."""
        name, result_id = self.config.name, delivery.result.id
        if self.config.origins and delivery.result.origin not in self.config.origins:
            self._store.delivered(name, result_id)
            return True
        error = self._attempt(delivery)
        if error is not None and self._stopping.is_set():  # `close` cut it off; it is due at the next start
            return False
        if error is None:
            self._store.delivered(name, result_id)
            self._failures, self._error = 0, ""
        elif isinstance(error, DeliveryRefusedError):
            self._store.refused(name, result_id, _one_line(error))
            self._failures, self._error = 0, ""  # it can be reached
            self._refusal = _one_line(error)
            _LOGGER.warning(
                "a destination refuses a result: %s", error.code, extra={"destination": name, "job": result_id}
            )
        else:
            self._postpone(delivery, error)
        try:
            self._on_outcome(name, delivery, error)
        except Exception as fault:
            self._count_fault("the observer of an outcome", fault)
        return error is None or isinstance(error, DeliveryRefusedError)

    def _attempt(self, delivery: Delivery) -> DeliveryError | None:
        self._attempt_began = time.monotonic()
        try:
            self.destination.deliver(delivery)
        except DeliveryError as error:
            return error
        except BaseException as error:  # even SystemExit of a library
            self._count_fault("the destination", error)
            # The message of a foreign exception may hold patient data.
            text = _one_line(error) if isinstance(error, EchoQuadError) else f"unexpected {type(error).__name__}"
            return DeliveryError(text)
        finally:
            self._attempt_began = None
        return None

    def _postpone(self, delivery: Delivery, error: DeliveryError) -> None:
        asked = min(error.retry_after or 0.0, _LONGEST_RETRY_AFTER_S)
        pause = max(back_off(self._failures + 1), asked)
        retry_after = pause
        if delivery.attempts >= _IN_ORDER_ATTEMPTS:
            retry_after += back_off(delivery.attempts)
        self._store.postpone(self.config.name, delivery.result.id, self._clock() + retry_after, _one_line(error))
        if not self._failures:
            _LOGGER.warning("a destination fails: %s", error.code, extra={"destination": self.config.name})
        self._rest(_one_line(error), pause)

    def _rest(self, error: str, pause: float) -> None:
        self._failures += 1
        self._error = error
        self._paused_until = time.monotonic() + pause

    def _count_fault(self, where: str, error: BaseException) -> None:
        self._faults += 1
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
        kind, extra = type(error).__name__, {"destination": self.config.name}
        _LOGGER.error("%s: unexpected %s at %s", where, kind, place, extra=extra)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MAX_ERROR_CHARACTERS] or type(error).__name__
