"""A stick that was changed in any way, or is not of the expected key, is refused before anything is installed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sticks import Box, Key, files, make_stick, seal, sign, write_sums


@pytest.fixture
def empty_box(box: Box) -> Iterator[Box]:
    """A box in which a test must leave nothing but the lock."""
    yield box
    assert [line for line in box.tree() if not line.startswith("run")] == []


def refuse(box: Box, stick: Path, *options: str | Path, words: str = "") -> None:
    assert words in box.run(stick, *options, code=3).err


def test_changed_byte_of_any_file_is_refused(empty_box: Box, copied: Path, key: Key) -> None:
    chance = random.Random(7)
    names = files(copied)
    assert {"install.sh", "SHA256SUMS", "SHA256SUMS.sig", "keys/bundle.pub", "requirements.lock"} < set(names)
    for name in names:
        path = copied / name
        whole = path.read_bytes()
        # Of the script itself, a byte of a comment: what a changed script does is up to whoever has changed it.
        at = whole.index(b"# Install") + 3 if name == "install.sh" else chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refuse(empty_box, copied, "--key", key.public)
        path.write_bytes(whole)
    assert "intact" in empty_box.run(copied, "--key", key.public, "--dry-run").out


def test_removed_file_is_refused(empty_box: Box, copied: Path, key: Key) -> None:
    for name in files(copied):
        if name != "install.sh":
            shutil.move(copied / name, copied.parent / "away")
            refuse(empty_box, copied, "--key", key.public)
            shutil.move(copied.parent / "away", copied / name)


@pytest.mark.parametrize(
    "name", ["added", "wheels/evil-1.0-py3-none-any.whl", "bundle/.hidden", "a\nb", "SHA256SUMS.bak"]
)
def test_added_file_is_refused(empty_box: Box, copied: Path, key: Key, name: str) -> None:
    (copied / name).write_text("x")
    refuse(empty_box, copied, "--key", key.public, words="does not belong")


def test_link_in_the_place_of_a_file_is_refused(empty_box: Box, copied: Path, key: Key) -> None:
    shutil.move(copied / "README.txt", copied.parent)
    (copied / "README.txt").symlink_to(copied.parent / "README.txt")
    refuse(empty_box, copied, "--key", key.public, words="no regular file")
    (copied / "README.txt").unlink()
    os.mkfifo(copied / "README.txt")
    refuse(empty_box, copied, "--key", key.public, words="no regular file")


@pytest.mark.parametrize(
    "line", ["{sum}  ../outside", "{sum}  /etc/passwd", "{sum}  bundle/../../x", "rubbish", "\\{sum}  a", ""]
)
def test_odd_names_in_the_sums_are_refused(empty_box: Box, copied: Path, key: Key, line: str) -> None:
    sums = copied / "SHA256SUMS"
    sums.write_text(sums.read_text() + line.format(sum="0" * 64) + "\n")
    sign(copied, key)
    refuse(empty_box, copied, "--key", key.public)


def test_stick_of_another_key_is_refused(empty_box: Box, copied: Path, key: Key, other_key: Key) -> None:
    refuse(empty_box, copied, "--key", other_key.public, words=key.der_sha256)
    refuse(empty_box, copied, "--key-sha256", other_key.der_sha256, words=key.der_sha256)
    seal(copied, other_key)
    refuse(empty_box, copied, "--key", key.public, words=other_key.der_sha256)
    shutil.copy(key.public, copied / "keys" / "bundle.pub")  # the right key and the sums of the other
    refuse(empty_box, copied, "--key", key.public, words="signature")
    write_sums(copied)
    sign(copied, other_key)
    refuse(empty_box, copied, "--key", key.public, words="signature")


def test_stick_needs_an_anchor_that_is_not_on_it(empty_box: Box, stick_1: Path, key: Key) -> None:
    refuse(empty_box, stick_1, words="--key")
    empty_box.run(stick_1, "--unsigned", code=2)
    empty_box.run(stick_1, "--key", "/nonexistent", code=2)
    assert key.der_sha256 in empty_box.run(stick_1, "--trust-stick", "--dry-run").out
    for value in (key.der_sha256, key.pem_sha256, key.der_sha256.upper()):
        empty_box.run(stick_1, "--key-sha256", value, "--dry-run")


def test_unsigned_stick_must_be_accepted_by_name(empty_box: Box, tmp_path: Path, key: Key, copied: Path) -> None:
    unsigned = make_stick(tmp_path / "unsigned", "1.0", None)
    refuse(empty_box, unsigned, words="--unsigned")
    refuse(empty_box, unsigned, "--key", key.public, words="signature")
    empty_box.run(unsigned, "--unsigned", "--dry-run")
    (unsigned / "bundle" / "bundle.json").write_text("{ }\n")
    refuse(empty_box, unsigned, "--unsigned", words="bundle/bundle.json was damaged or changed")


@pytest.mark.slow
def test_upgrade_by_another_key_needs_that_key(
    box: Box, stick_1: Path, tmp_path: Path, key: Key, other_key: Key
) -> None:
    box.run(stick_1, "--key", key.public)
    assert (box.etc / "bundle.pub").read_text() == key.public.read_text()
    before = box.tree()
    other = make_stick(tmp_path / "other", "2.0", other_key)
    refuse(box, other, words=other_key.der_sha256)
    assert box.tree() == before
    box.run(other, "--key", other_key.public)
    assert (box.etc / "bundle.pub").read_text() == other_key.public.read_text()
    box.run(None, "--rollback")  # the old bundle needs the old key
    assert (box.etc / "bundle.pub").read_text() == key.public.read_text()


def test_check_by_hand_finds_a_changed_script(copied: Path, key: Key) -> None:
    """Before the script runs, two programs of the system check the stick and the script with it."""
    verify = ["openssl", "dgst", "-sha256", "-verify", str(key.public), "-signature", "SHA256SUMS.sig", "SHA256SUMS"]
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    for command in (verify, check):
        subprocess.run(command, cwd=copied, check=True, capture_output=True)
    with (copied / "install.sh").open("a") as script:
        script.write("#")
    assert subprocess.run(check, cwd=copied, check=False, capture_output=True).returncode != 0
