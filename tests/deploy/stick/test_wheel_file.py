"""Wheel files: names, metadata and licence texts, also of wheels that are not in order."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from echoquad_deploy.stick.errors import WheelhouseError
from echoquad_deploy.stick.licences import write_licences
from echoquad_deploy.stick.wheel_file import WheelFile


@pytest.mark.parametrize(
    ("file", "name", "version"),
    [
        ("typing_extensions-4.16.0-py3-none-any.whl", "typing-extensions", "4.16.0"),
        ("Zope.Interface-5.0-1build2-cp39-cp39-linux_x86_64.whl", "zope-interface", "5.0"),
        ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", "torch", "2.13.0+cpu"),
        ("a-1!2.0-cp311-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", "a", "1!2.0"),
    ],
)
def test_name_and_version_come_from_the_file_name(file: str, name: str, version: str) -> None:
    wheel = WheelFile(Path(file))
    assert (wheel.name, wheel.version) == (name, version)


@pytest.mark.parametrize("file", ["a.tar.gz", "a-1.0.whl", "a-1.0-py3-none-any.zip", "-1.0-py3-none-any.whl"])
def test_other_file_names_are_refused(file: str) -> None:
    with pytest.raises(WheelhouseError, match="not the file name of a wheel"):
        WheelFile(Path(file))


def test_licence_texts_are_found_in_metadata_and_among_the_code(
    make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    files = {
        "lib-1.0.dist-info/licenses/LICENSE": b"own",
        "lib-1.0.dist-info/licenses/vendored/thing/any-name.txt": b"vendored",
        "lib-1.0.dist-info/COPYING.LESSER": b"old layout",
        "lib/ThirdPartyNotices.txt": b"third parties",
        "lib/licensing.py": b"import this",
        "lib/notices.json": b"{}",
    }
    wheel = WheelFile(make_wheel(tmp_path, "lib", files=files))
    assert {path.as_posix(): data for path, data in wheel.licence_texts()} == {
        "LICENSE": b"own",
        "vendored/thing/any-name.txt": b"vendored",
        "COPYING.LESSER": b"old layout",
        "lib/ThirdPartyNotices.txt": b"third parties",
    }


def test_hostile_member_names_stay_in_the_folder(make_wheel: Callable[..., Path], tmp_path: Path) -> None:
    files = {
        "../../../evil/LICENSE": b"1",
        "/etc/LICENSE": b"2",
        "lib/a:b|c?/LICENSE": b"3",
        "lib-1.0.dist-info/licenses/LICENCE": b"4",
        "lib-1.0.dist-info/licenses/licence": b"5",
        "lib-1.0.dist-info/licenses/-rf LICENSE": b"6",
    }
    path = make_wheel(tmp_path / "wheels", "lib", files=files)
    assert write_licences(tmp_path / "out" / "licences", [WheelFile(path)]) == []
    place = tmp_path / "out" / "licences" / "lib-1.0"
    found = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert sorted(found.values()) == [b"1", b"2", b"3", b"4", b"5", b"6"]
    assert len({name.lower() for name in found}) == 6
    assert not any(set(name) & set(':|?*"<>\\') or name.startswith("-") for name in found)
    assert {path.name for path in tmp_path.iterdir()} == {"wheels", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"licences"}


def test_table_names_licences_and_wheels_without_a_text(make_wheel: Callable[..., Path], tmp_path: Path) -> None:
    whole_text = "License: line one of a text that has\n        many lines"
    wheels = [
        make_wheel(tmp_path, "expression", fields=["License-Expression: MIT AND BSD-3-Clause"]),
        make_wheel(tmp_path, "field", fields=["License: Apache 2.0"], files={}),
        make_wheel(
            tmp_path, "text", fields=[whole_text, "Classifier: License :: OSI Approved :: Apache Software License"]
        ),
        make_wheel(tmp_path, "nothing"),
    ]
    assert write_licences(tmp_path / "licences", map(WheelFile, wheels)) == ["field"]
    lines = (tmp_path / "licences" / "README.txt").read_text().splitlines()[4:]
    assert [tuple(filter(None, map(str.strip, line.split("  ")))) for line in lines] == [
        ("expression", "1.0", "MIT AND BSD-3-Clause", "1"),
        ("field", "1.0", "Apache 2.0", "none in the wheel"),
        ("text", "1.0", "Apache Software License", "1"),
        ("nothing", "1.0", "not stated", "1"),
    ]


def test_file_that_is_no_archive_and_archive_without_metadata_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "a-1.0-py3-none-any.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(WheelhouseError, match="cannot be read as a wheel"):
        _ = WheelFile(broken).metadata
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("a/__init__.py", "")
    with pytest.raises(WheelhouseError, match=r"0 \.dist-info folders"):
        _ = WheelFile(broken).metadata
