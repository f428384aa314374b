"""Files of tensors: bounds before anything is loaded, checksums, and one kind of error for any damage."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from echoquad_train.networks.weight_files import TensorFileError, first_line, read_archive, read_safetensors

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.zeros(3)}


def archive(**changes: object) -> bytes:
    stream = io.BytesIO()
    torch.save({**STATE, "epoch": 3, **changes}, stream)
    return stream.getvalue()


def repacked(data: bytes, compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return stream.getvalue()


def test_files_are_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save(STATE, {"key": "value"}))
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.metadata == {"key": "value"} and found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in STATE.items())
    (tmp_path / "y.safetensors").write_bytes(safetensors.torch.save(STATE))
    other = read_safetensors(tmp_path / "y.safetensors")
    assert other.metadata == {} and other.sha256 == found.sha256  # the hash is that of the tensors
    (tmp_path / "x.pt").write_bytes(archive())
    assert read_archive(tmp_path / "x.pt")["epoch"] == 3
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_archive(tmp_path / "old.pt")["a.weight"], STATE["a.weight"])


def test_safetensors_header_that_announces_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    huge = {"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    for header in (json.dumps(huge).encode(), b"[" * 100_000, b'{"a":' + b"[" * 90_000):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(TensorFileError):
            read_safetensors(path)
    with path.open("wb") as stream:  # a sparse file: a gigabyte of header
        stream.write(struct.pack("<Q", 1 << 30))
        stream.truncate((1 << 30) + 8)
    with pytest.raises(TensorFileError):
        read_safetensors(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_refused_before_it_is_unpacked(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    path.write_bytes(repacked(archive(zeros=torch.zeros(1 << 22)), compression))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(TensorFileError, match="compressed"):
        read_archive(path)


def test_archive_whose_records_overlap_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "x.pt", bytearray(archive())
    start = data.index(b"PK\x01\x02")
    while data[start : start + 4] == b"PK\x01\x02":  # each entry of the directory announces the whole file
        struct.pack_into("<LL", data, start + 20, len(data), len(data))
        start += 46 + sum(struct.unpack_from("<HHH", data, start + 28))
    path.write_bytes(data)
    with pytest.raises(TensorFileError, match="announce more bytes"):
        read_archive(path)


def test_changed_bytes_of_an_archive_are_noticed(tmp_path: Path) -> None:
    path, data = tmp_path / "x.pt", bytearray(archive())
    data[data.index(STATE["a.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(TensorFileError, match="checksum"):
        read_archive(path)


@pytest.mark.parametrize("kind", ["x.pt", "x.safetensors", "old.pt"])
def test_damaged_file_raises_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "old.pt":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(archive() if kind == "x.pt" else safetensors.torch.save(STATE, {"key": "value"}))
    whole, rng = path.read_bytes(), random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, 0x7F, rng.randrange(256)])
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            read_safetensors(path) if path.suffix == ".safetensors" else read_archive(path)
        except TensorFileError:
            continue


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_pipe_and_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        for read in (read_archive, read_safetensors):
            with pytest.raises(TensorFileError, match="no regular file"):
                read(path)


def test_first_line_of_error_message() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"


def test_complex_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(TensorFileError, match="complex"):
        read_safetensors(path)
    path.write_bytes(archive(optimizer={"state": [{"average": torch.zeros(2, dtype=torch.complex64)}]}))
    with pytest.raises(TensorFileError, match="complex"):
        read_archive(path)
