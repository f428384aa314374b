"""The feed of pictures: made only while somebody watches, and never an old one."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image

from echoquad_serve.live.picture_feed import PictureFeed


def test_pictures_are_wanted_only_while_somebody_watches() -> None:
    told: list[bool] = []
    feed = PictureFeed(told.append)
    first, second = feed.frames(), feed.frames()
    assert told == []
    threading.Timer(0.05, feed.put, [b"one"]).start()
    assert next(first) == b"one"
    threading.Timer(0.05, feed.put, [b"two"]).start()
    assert next(second) == b"two"
    assert (told, feed.watchers) == ([True], 2)
    closed(first)
    assert told == [True]
    closed(second)
    assert (told, feed.watchers) == ([True, False], 0)


def closed(frames: Iterator[bytes]) -> None:
    frames.close()  # type: ignore[attr-defined]


def test_picture_is_repeated_and_turns_black_when_there_is_none() -> None:
    feed = PictureFeed(lambda _: None)
    frames = feed.frames()
    assert is_black(next(frames))  # nothing yet, after a second
    feed.put(b"picture")
    assert next(frames) == b"picture"
    assert next(frames) == b"picture"  # a second later
    feed.put(None)
    assert is_black(next(frames))


def test_next_watcher_does_not_see_the_picture_of_the_last_time() -> None:
    feed = PictureFeed(lambda _: None)
    frames = feed.frames()
    threading.Timer(0.05, feed.put, [b"old"]).start()
    next(frames)
    closed(frames)
    assert is_black(next(feed.frames()))


def test_close_ends_every_feed() -> None:
    feed = PictureFeed(lambda _: None)
    frames = feed.frames()
    threading.Timer(0.05, feed.close).start()
    assert list(frames) == []
    assert list(feed.frames()) == []
    assert feed.watchers == 0


def is_black(jpeg: bytes) -> bool:
    return not np.asarray(Image.open(io.BytesIO(jpeg))).any()
