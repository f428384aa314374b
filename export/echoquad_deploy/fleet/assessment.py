"""Compare the services of a fleet: with the bundle that they should run, with each other, and with limits."""

from __future__ import annotations

import contextlib
import queue
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from echoquad_deploy.fleet.addresses import BoxAddress
from echoquad_deploy.fleet.box import Box, ask_box
from echoquad_runtime.errors import UsageError

__all__ = ["CLOCK_S", "THREADS", "ask_fleet", "assess", "expected_hash"]

THREADS: Final = 32
"""Services that are asked at the same time."""
CLOCK_S: Final = 60.0
"""Difference of the clocks, in seconds, from which it is noted."""

_GRACE_S: Final = 0.5  # beyond the time limit, which a service keeps by itself once its name is looked up
_TOO_LATE: Final = "no answer in time; the look-up of its name may hang: check the name and the name server"
_SHORTEST_HASH: Final = 12
_SHOWN: Final = 12  # digits of a hash


def expected_hash(text: str) -> str:
    """Return the SHA-256 of a bundle, or its beginning, from a bundle's folder or the digits themselves.

    Raises
    ------
    UsageError
        If it is neither.
    BundleError
        If the bundle is damaged.
    """
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.bundle.manifest import MANIFEST

    if (Path(text) / MANIFEST).is_file():
        return str(Bundle(text).manifest["manifest_sha256"])
    digits = text.lower()
    if _SHORTEST_HASH <= len(digits) <= 64 and set(digits) <= set("0123456789abcdef"):
        return digits
    raise UsageError(
        f"--expect {text[:80]!r}: expected a bundle's folder, or {_SHORTEST_HASH} to 64 digits of its SHA-256"
    )


def ask_fleet(
    addresses: Sequence[BoxAddress],
    *,
    timeout: float,
    token: str | None,
    tls: ssl.SSLContext,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Box]:
    """Ask services, many at a time; see `ask_box`.

    Parameters
    ----------
    addresses
        The services.
    timeout
        Seconds for each of them.
    token
        Bearer token for all of them; None to send none.
    tls
        Checks their certificates.
    progress
        Called with the number of services that are done.

    Returns
    -------
    list of Box
        In the order of `addresses`.
    """
    answers: queue.SimpleQueue[tuple[int, Box | BaseException]] = queue.SimpleQueue()

    def ask(index: int) -> None:
        try:
            answers.put((index, ask_box(addresses[index], timeout=timeout, token=token, tls=tls)))
        except BaseException as error:  # a fault in EchoQuad, raised again where it can be reported
            answers.put((index, error))

    boxes: dict[int, Box] = {}
    waiting, running = deque(range(len(addresses))), dict[int, float]()
    while len(boxes) < len(addresses):
        while waiting and len(running) < THREADS:
            index = waiting.popleft()
            running[index] = time.monotonic() + timeout + _GRACE_S
            # A daemon: the system may take minutes to look a name up, and Ctrl-C must not wait for that.
            threading.Thread(target=ask, args=(index,), name="echoquad-fleet", daemon=True).start()
        for index in [one for one, end in running.items() if time.monotonic() > end]:
            del running[index]
            boxes[index] = Box(addresses[index].url, error=_TOO_LATE)
        with contextlib.suppress(queue.Empty):
            index, answer = answers.get(timeout=_GRACE_S / 2)
            if isinstance(answer, BaseException):
                raise answer
            if running.pop(index, None) is not None:  # nobody waits for a late one any more
                boxes[index] = answer
        progress(len(boxes))
    return [boxes[index] for index in range(len(addresses))]


def assess(boxes: Sequence[Box], expected: str | None, late: float) -> list[Box]:
    """Return the boxes with their findings and notes.

    Parameters
    ----------
    boxes
        The answers.
    expected
        SHA-256 of the bundle that all should run, or its beginning; None to compare them with each other: the bundle
        of most boxes is then the one expected, and if no bundle has most of them, every box has a finding.
    late
        Seconds that an object or a result may wait.
    """
    counts = Counter(box.bundle_sha256 for box in boxes if box.bundle_sha256)
    return [
        box
        if box.error
        else replace(box, findings=tuple(_findings(box, expected, counts, late)), notes=tuple(_notes(box)))
        for box in boxes
    ]


def _findings(box: Box, expected: str | None, counts: Counter[str], late: float) -> Iterator[str]:
    if not box.ready:
        yield f"not ready: {'; '.join(box.reasons) or 'no reason given'}"
    if not box.bundle_sha256:
        yield "no bundle is loaded"
    else:
        if finding := _other_bundle(box.bundle_sha256, expected, counts):
            yield finding
        if not box.self_test:
            yield "the self-test has not passed"
    if box.oldest_s > late:
        yield f"late: the oldest object waits for {box.oldest_s:.0f} s"
    if box.full:
        yield "queue or disk full: nothing is accepted"
    for one in box.destinations:
        if one.refused:
            yield f"{one.name} refuses {one.refused} result{'s' if one.refused > 1 else ''}"
        if one.oldest_s > late:
            yield f"late: {one.name} has not had a result for {one.oldest_s:.0f} s"


def _other_bundle(found: str, expected: str | None, counts: Counter[str]) -> str:
    """Return what is wrong with the bundle of a box; empty if nothing is."""
    if expected is not None:
        return "" if found.startswith(expected) else f"other bundle; expected {expected[:_SHOWN]}"
    ranked = counts.most_common(2)
    if len(ranked) == 1:
        return ""
    (common, most), (_, second) = ranked
    if most == second:
        return f"bundles differ: {counts[found]} of {counts.total()} boxes run this one"
    return "" if found == common else f"other bundle; {most} of {counts.total()} boxes run {common[:_SHOWN]}"


def _notes(box: Box) -> Iterator[str]:
    if box.drift:
        yield "drift: look at the latest frames"
    if box.clock_s is not None and abs(box.clock_s) > CLOCK_S:
        yield f"clock {abs(box.clock_s):.0f} s {'ahead' if box.clock_s > 0 else 'behind'}"
