"""The slot for the newest frame: newer frames replace older ones, and each is taken or counted as dropped."""

from __future__ import annotations

import threading
import time

import numpy as np

from echoquad_serve.live.newest_frame import LiveFrame, NewestFrame

GREY = np.zeros((2, 2), np.uint8)


def frame(number: int) -> LiveFrame:
    return LiveFrame(GREY, time.monotonic(), number)


def test_newest_frame_is_taken_once_and_older_ones_are_counted() -> None:
    slot = NewestFrame()
    for number in (1, 2, 3):
        slot.put(frame(number))
    taken = slot.get(0)
    assert taken is not None
    assert (taken.number, taken.dropped) == (3, 2)
    assert slot.get(0) is None


def test_get_returns_as_soon_as_there_is_a_frame() -> None:
    slot = NewestFrame()
    found: list[LiveFrame | None] = []
    waiting = threading.Thread(target=lambda: found.append(slot.get(30)))
    waiting.start()
    slot.put(frame(1))
    waiting.join(5)
    assert [one.number for one in found if one is not None] == [1]


def test_close_drops_what_waits_and_what_comes_and_ends_waits() -> None:
    slot = NewestFrame()
    slot.put(frame(1))
    slot.close()
    slot.put(frame(2))
    assert slot.get(30) is None
    assert slot.dropped == 2


def test_every_frame_is_taken_or_dropped_between_threads() -> None:
    slot, taken = NewestFrame(), list[int]()
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            if (one := slot.get(0.05)) is not None:
                taken.append(one.number)

    taker = threading.Thread(target=take)
    taker.start()
    for number in range(20_000):
        slot.put(frame(number))
    done.set()
    taker.join(5)
    slot.close()
    assert taken == sorted(set(taken))
    assert len(taken) + slot.dropped == 20_000
