"""A data set that is written as it comes: full disks, limits, and what stays."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom")

from pydicom import dcmread

from echoquad_serve.dicom_network import received_file
from echoquad_serve.dicom_network.received_file import ReceivedFile, ReceivedTooLargeError, remove_leftovers
from echoquad_serve.errors import QueueFullError, StorageFullError

from .conftest import ULTRASOUND

EXPLICIT = "1.2.840.10008.1.2.1"
DATA = b"\x08\x00\x18\x00UI\x06\x001.2.3\x00"


def no_limit(size: int) -> None:
    pass


def test_parts_become_a_dicom_file(tmp_path: Path) -> None:
    file = ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, no_limit)
    for start in range(0, len(DATA), 5):
        file.write(DATA[start : start + 5])
    file.finish()
    read = dcmread(file.path)
    assert (read.SOPInstanceUID, read.file_meta.MediaStorageSOPInstanceUID) == ("1.2.3", "1.2.3")
    assert read.file_meta.TransferSyntaxUID == EXPLICIT
    assert (file.size, file.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_at_the_end_and_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        closed = False

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush = lambda self: None

    file = ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, no_limit)
    file._stream.close()  # type: ignore[union-attr]
    file._stream = Full()  # type: ignore[assignment]
    for _ in range(3):
        file.write(DATA)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageFullError, match="cannot be written"):
        file.finish()


def test_last_bytes_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    class Late:
        closed = False

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    file = ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, no_limit)
    file._stream.close()  # type: ignore[union-attr]
    file._stream = Late()  # type: ignore[assignment]
    with pytest.raises(StorageFullError):
        file.finish()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_gone_is_no_crash(tmp_path: Path) -> None:
    file = ReceivedFile(tmp_path / "gone", ULTRASOUND, "1.2.3", EXPLICIT, no_limit)
    file.write(DATA)
    with pytest.raises(StorageFullError):
        file.finish()


def test_room_is_checked_before_and_on_the_way(tmp_path: Path) -> None:
    asked: list[int] = []

    def check(size: int) -> None:
        asked.append(size)
        if len(asked) == 3:
            raise QueueFullError("full")

    file = ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, check)
    part = bytes(1024 * 1024)
    for _ in range(60):
        file.write(part)
    assert len(asked) == 3 and asked[0] == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(QueueFullError):
        file.finish()


def test_largest_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_file, "MAX_OBJECT_BYTES", 100)
    file = ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, no_limit)
    file.write(bytes(100))
    file.write(bytes(1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ReceivedTooLargeError):
        file.finish()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    ReceivedFile(tmp_path, ULTRASOUND, "1.2.3", EXPLICIT, no_limit).close()
    (tmp_path / "upload.part").touch()  # of another intake
    assert remove_leftovers(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["upload.part"]
