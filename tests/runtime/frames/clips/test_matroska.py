"""Elements of Matroska files: clusters that are cut, and bounds of the tables."""

from __future__ import annotations

import io

import pytest

from echoquad_runtime.errors import FrameTooLargeError
from echoquad_runtime.frames.clips.matroska import is_matroska_complete

EBML, SEGMENT, CLUSTER, CUES, INFO = (
    bytes.fromhex(text) for text in ["1a45dfa3", "18538067", "1f43b675", "1c53bb6b", "1549a966"]
)
UNKNOWN = b"\x01" + b"\xff" * 7


def element(name: bytes, content: bytes, length: bytes | None = None) -> bytes:
    return name + (length or (1 << 56 | len(content)).to_bytes(8, "big")) + content


def matroska(*elements: bytes, length: bytes | None = None) -> bytes:
    return element(EBML, bytes(20)) + element(SEGMENT, b"".join(elements), length)


def complete(data: bytes) -> bool:
    return is_matroska_complete(io.BytesIO(data))


CLIP = (element(INFO, bytes(30)), element(CLUSTER, bytes(100)), element(CLUSTER, bytes(100)))


def test_clusters_within_the_file_are_complete() -> None:
    assert complete(matroska(*CLIP))
    assert complete(matroska(*CLIP, element(CUES, bytes(50)))[:-20])  # all frames are there
    assert complete(matroska(*CLIP, length=UNKNOWN))


@pytest.mark.parametrize("cut", [1, 99, 112, 150])
def test_cut_clusters_are_incomplete(cut: int) -> None:
    assert not complete(matroska(*CLIP)[:-cut])


def test_cut_cluster_of_a_segment_without_length_is_incomplete() -> None:
    assert not complete(matroska(*CLIP, length=UNKNOWN)[:-1])


def test_large_tables_are_refused() -> None:
    with pytest.raises(FrameTooLargeError):
        complete(matroska(element(CUES, bytes(9 << 20)), *CLIP))
    with pytest.raises(FrameTooLargeError):
        complete(matroska(*[element(INFO, b"")] * 500_001))
