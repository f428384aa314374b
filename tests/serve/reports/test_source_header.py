"""The header of a source: odd, damaged and hostile files."""

from __future__ import annotations

import logging
import random
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echoquad_serve.errors import DeliveryRefusedError
from echoquad_serve.reports.source_header import MAX_HEADER_BYTES, read_source_header

NAME, SECRET = 0x00100010, "SECRET^PATIENT"


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_object_without_a_uid_is_refused(kit: SimpleNamespace, tmp_path: Path, keyword: str) -> None:
    with pytest.raises(DeliveryRefusedError, match="UID"):
        read_source_header(kit.write_source(tmp_path / "a.dcm", **{keyword: None}))


def patched(path: Path, old: bytes, new: bytes) -> Path:
    assert len(old) == len(new) and path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "tag"),
    [
        (b"19700131", b"19709931", 0x00100030),
        (b"19700131", b"1970.1.3", 0x00100030),
        (b"101112", b"991112", 0x00080030),
        (b"CS\x02\0F ", b"CS\x02\0XX", 0x00100040),
        (b"P-1 ", b"P\\1 ", 0x00100020),
        (b"P-1 ", b"P\n1 ", 0x00100020),
    ],
)
def test_value_that_dicom_does_not_allow_is_left_out(
    kit: SimpleNamespace, tmp_path: Path, old: bytes, new: bytes, tag: int
) -> None:
    header = read_source_header(patched(kit.write_source(tmp_path / "a.dcm"), old, new))
    assert header is not None and header.values[tag][1] == b""


@pytest.mark.parametrize("character_set", [None, "ISO_IR 999"])
def test_character_of_an_unknown_set_becomes_a_question_mark(
    kit: SimpleNamespace, tmp_path: Path, character_set: str | None
) -> None:
    source = kit.write_source(tmp_path / "a.dcm", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^J")
    if character_set is None:
        patched(source, b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"\x08\0\x01\0LO\x0a\0ISO_IR 100")
    else:
        patched(source, b"ISO_IR 100", character_set.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = read_source_header(source)
    assert header is not None and header.character_set == b"" and header.values[NAME] == ("PN", b"M?ller^J")


def test_damaged_headers_are_refused_or_read_and_no_value_gets_out(
    kit: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = kit.write_source(tmp_path / "a.dcm", PatientName=SECRET, SpecificCharacterSet="ISO_IR 100").read_bytes()
    chance, refused = random.Random(7), 0
    caplog.set_level(logging.DEBUG)
    for turn in range(150):
        data = bytearray(whole[: chance.randrange(140, len(whole))] if turn % 3 == 0 else whole)
        for _ in range(chance.randrange(4)):
            data[chance.randrange(132, len(data))] = chance.randrange(256)
        (tmp_path / "b.dcm").write_bytes(data)
        try:
            kit.build(kit.make_result(), tmp_path / "b.dcm", kinds=("sr",))
        except DeliveryRefusedError as error:
            refused += 1
            assert "SECRET" not in str(error) and error.__cause__ is None and error.__context__ is None
    assert 0 < refused < 150
    assert "SECRET" not in caplog.text


def test_deflated_header_inflates_no_further_than_the_limit(kit: SimpleNamespace, tmp_path: Path) -> None:
    source = kit.write_source(tmp_path / "a.dcm").read_bytes()
    uid = b"1.2.840.10008.1.2.1\0"
    start = source.index(b"\x08\0\x16\0")
    meta = source[:start].replace(b"UI\x14\0" + uid, b"UI\x16\x001.2.840.10008.1.2.1.99")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = source[start:] + b"\xe0\x7f\x10\0OW\0\0\xff\xff\xff\x7f" + bytes(40 * MAX_HEADER_BYTES)
    (tmp_path / "b.dcm").write_bytes(meta + squeeze.compress(body) + squeeze.flush())
    header = read_source_header(tmp_path / "b.dcm")
    assert header is not None and header.study_uid == "1.2.3"


def test_deep_nesting_is_refused(kit: SimpleNamespace, tmp_path: Path) -> None:
    source: Any = kit.write_source(tmp_path / "a.dcm").read_bytes()
    start = source.index(b"\x08\0\x16\0")
    level = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    (tmp_path / "b.dcm").write_bytes(source[:start] + level * 100_000)
    with pytest.raises(DeliveryRefusedError):
        read_source_header(tmp_path / "b.dcm")
