"""SHA256SUMS and its signature, held against sha256sum and openssl; every change of a stick is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from echoquad_deploy.stick.check import verify_stick
from echoquad_deploy.stick.errors import StickError
from echoquad_deploy.stick.packer import PackedStick
from echoquad_deploy.stick.sums import check_sums, read_sums, sign_sums, write_sums
from echoquad_runtime.errors import ConfigError

PACKAGES = {"mformat": "mtools", "mcopy": "mtools", "sha256sum": "coreutils"}


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs Debian's {PACKAGES.get(program, program)}")


def openssl(*arguments: str | Path) -> str:
    needs("openssl")
    ended = subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
    return ended.stdout.decode("ascii", "replace")


def test_sums_and_signature_pass_sha256sum_and_openssl(packed: PackedStick, keys: Path) -> None:
    needs("sha256sum")
    ended = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        check=False,
        capture_output=True,
        text=True,
        cwd=packed.folder,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    listed = {line.removesuffix(": OK") for line in ended.stdout.splitlines()}
    files = {path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS", "SHA256SUMS.sig"}
    lines = (packed.folder / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(listed)
    verify = [
        "-verify",
        keys / "ours.pub.pem",
        "-signature",
        packed.folder / "SHA256SUMS.sig",
        packed.folder / "SHA256SUMS",
    ]
    assert openssl("dgst", "-sha256", *verify) == "Verified OK\n"


def test_stick_survives_the_file_system_of_a_usb_stick(packed: PackedStick, keys: Path, tmp_path: Path) -> None:
    """Copy it to an image with FAT and back: no name is cut, changed or lost."""
    for program in ("mformat", "mcopy"):
        needs(program)
    image, back = tmp_path / "usb.img", tmp_path / "back"
    back.mkdir()
    for command in (
        ["mformat", "-C", "-F", "-T", "131072", "-i", image, "::"],
        ["mcopy", "-s", "-i", image, packed.folder, "::"],
        ["mcopy", "-s", "-i", image, "::stick", back],
    ):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert verify_stick(back / "stick", keys / "ours.pub.pem").files == verify_stick(packed.folder).files


def test_fingerprint_is_that_of_the_der_form(packed: PackedStick, keys: Path, tmp_path: Path) -> None:
    openssl("pkey", "-pubin", "-in", keys / "ours.pub.pem", "-outform", "DER", "-out", tmp_path / "key.der")
    assert openssl("dgst", "-sha256", "-r", tmp_path / "key.der").split()[0] == packed.fingerprint
    assert (packed.folder / "keys" / "bundle.pub").read_bytes() == (keys / "ours.pub.pem").read_bytes()


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_one_line_of_openssl_verifies_the_signature_of_every_curve(curve: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    folder, key, public = tmp_path / "folder", tmp_path / "key.pem", tmp_path / "key.pub"
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    folder.mkdir()
    (folder / "a").write_bytes(b"content")
    write_sums(folder)
    sign_sums(folder, key)
    verify = ["-verify", public, "-signature", folder / "SHA256SUMS.sig", folder / "SHA256SUMS"]
    assert openssl("dgst", "-sha256", *verify) == "Verified OK\n"


def test_intact_stick_passes_with_and_without_the_key(packed: PackedStick, keys: Path) -> None:
    trusted, alone = verify_stick(packed.folder, keys / "ours.pub.pem"), verify_stick(packed.folder)
    assert (trusted.trusted, alone.trusted) == (True, False)
    assert trusted.fingerprint == alone.fingerprint == packed.fingerprint
    assert trusted.facts["target"] == "aarch64"


def test_stick_signed_by_another_key_is_refused(packed: PackedStick, keys: Path) -> None:
    with pytest.raises(StickError, match=r"not signed by the key of .*theirs\.pub") as error:
        verify_stick(packed.folder, keys / "theirs.pub.pem")
    assert (error.value.code, error.value.exit_code) == ("E_STICK", 3)


def test_private_key_given_for_the_public_one_is_refused(packed: PackedStick, keys: Path) -> None:
    with pytest.raises(ConfigError, match="found a private key"):
        verify_stick(packed.folder, keys / "ours.pem")


def test_a_changed_byte_in_any_file_is_noticed(packed: PackedStick, stick: Path, keys: Path) -> None:
    """Flip one bit in the middle of each file in turn, then restore it."""
    names = [path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()]
    assert len(names) > 15
    for name in sorted(names):
        original = (packed.folder / name).read_bytes()
        middle = len(original) // 2
        (stick / name).write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
        with pytest.raises(StickError, match=r"changed|damaged|signed"):
            verify_stick(stick, keys / "ours.pub.pem")
        (stick / name).write_bytes(original)
    verify_stick(stick, keys / "ours.pub.pem")


def test_a_missing_file_is_noticed_whichever_it_is(packed: PackedStick, stick: Path, keys: Path) -> None:
    names = [path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()]
    for name in sorted(names):
        (stick / name).rename(stick.parent / "away")
        with pytest.raises(StickError, match="missing"):
            verify_stick(stick, keys / "ours.pub.pem")
        (stick.parent / "away").rename(stick / name)
    verify_stick(stick, keys / "ours.pub.pem")


def _add_file(stick: Path) -> None:
    (stick / "wheels" / "evil-1.0-py3-none-any.whl").write_bytes(b"")


def _add_hidden_file(stick: Path) -> None:
    (stick / "bundle" / ".hidden").write_bytes(b"")


def _link_a_file(stick: Path) -> None:
    (stick / "install.sh").rename(stick.parent / "elsewhere.sh")
    (stick / "install.sh").symlink_to(stick.parent / "elsewhere.sh")


def _link_a_folder(stick: Path) -> None:
    (stick / "wheels").rename(stick.parent / "elsewhere")
    (stick / "wheels").symlink_to(stick.parent / "elsewhere")


def _add_a_pipe(stick: Path) -> None:
    os.mkfifo(stick / "config" / "pipe")


def _swap_two_wheels(stick: Path) -> None:
    a, b = sorted((stick / "wheels").iterdir())[:2]
    a.rename(stick.parent / "third")
    b.rename(a)
    (stick.parent / "third").rename(b)


def _remove_signature_and_change(stick: Path) -> None:
    (stick / "SHA256SUMS.sig").unlink()
    (stick / "install.sh").write_text("evil")
    write_sums(stick)


def _truncate_sums(stick: Path) -> None:
    lines = (stick / "SHA256SUMS").read_bytes().splitlines(keepends=True)
    (stick / "SHA256SUMS").write_bytes(b"".join(lines[:-1]))


CHANGES = (
    (_add_file, "'wheels/evil-1.0-py3-none-any.whl' is not named"),
    (_add_hidden_file, "'bundle/.hidden' is not named"),
    (_link_a_file, "'install.sh' is a link"),
    (_link_a_folder, "'wheels' is a link"),
    (_add_a_pipe, "'config/pipe' is a link or no regular file"),
    (_swap_two_wheels, "'wheels/.*' was damaged or changed"),
    (_remove_signature_and_change, r"SHA256SUMS\.sig is missing"),
    (_truncate_sums, "SHA256SUMS was not signed by the key"),
)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need rights on Windows")
@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[change.__name__.strip("_") for change, _ in CHANGES])
def test_change_is_noticed(change: Callable[[Path], None], message: str, stick: Path, keys: Path) -> None:
    change(stick)
    with pytest.raises(StickError, match=message):
        verify_stick(stick, keys / "ours.pub.pem")


def test_stick_that_somebody_else_signed_again_passes_only_without_the_owners_key(stick: Path, keys: Path) -> None:
    """The key on a stick proves nothing: whoever changes the stick can change the key as well."""
    (stick / "install.sh").write_text("evil")
    (stick / "keys" / "bundle.pub").write_bytes((keys / "theirs.pub.pem").read_bytes())
    write_sums(stick)
    sign_sums(stick, keys / "theirs.pem")
    assert not verify_stick(stick).trusted
    with pytest.raises(StickError, match="not signed by the key"):
        verify_stick(stick, keys / "ours.pub.pem")


def test_bundle_of_another_key_on_a_stick_of_the_owners_key_is_refused(stick: Path, keys: Path) -> None:
    from echoquad_runtime.bundle.signing import sign_bundle

    sign_bundle(stick / "bundle", keys / "theirs.pem")
    write_sums(stick)
    sign_sums(stick, keys / "ours.pem")
    with pytest.raises(StickError, match="signed by another key"):
        verify_stick(stick, keys / "ours.pub.pem")


def _repack(stick: Path, name: str, data: bytes) -> None:
    (stick / name).write_bytes(data)
    (stick / "SHA256SUMS.sig").unlink()
    write_sums(stick)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"{}", "stick.json is missing or malformed"),
        (b"[1]", "stick.json is missing or malformed"),
        (b"\xff", "stick.json is missing or malformed"),
        (json.dumps({"format": 2}).encode(), "format 2; expected 1: use the release"),
        (json.dumps({"format": 1, "bundle_sha256": "0" * 64}).encode(), "another bundle"),
    ],
)
def test_facts_that_do_not_fit_the_stick_are_refused(facts: bytes, message: str, stick: Path) -> None:
    _repack(stick, "stick.json", facts)
    with pytest.raises(StickError, match=message):
        verify_stick(stick)


def test_lock_and_wheels_that_differ_are_refused(stick: Path) -> None:
    lines = (stick / "requirements.lock").read_bytes().splitlines(keepends=True)
    _repack(stick, "requirements.lock", b"".join(lines[1:]))
    with pytest.raises(StickError, match=r"^.*: cryptography 1\.0 is a wheel that is not locked"):
        verify_stick(stick)
    _repack_lock(stick, lines[0].replace(b"sha256:", b"md5:") + b"".join(lines[1:]))
    with pytest.raises(StickError, match=r"requirements\.lock is missing or malformed"):
        verify_stick(stick)


def _repack_lock(stick: Path, data: bytes) -> None:
    (stick / "requirements.lock").write_bytes(data)
    write_sums(stick)


@pytest.mark.parametrize(
    "line", ["", "x", f"{'0' * 64} a", f"{'0' * 64}  ../a", f"{'0' * 64}  /a", f"{'0' * 64} *a", f"{'0' * 63}  a"]
)
def test_malformed_sums_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    write_sums(tmp_path)
    with (tmp_path / "SHA256SUMS").open("a", newline="") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(StickError, match="SHA256SUMS is damaged"):
        check_sums(tmp_path, read_sums(tmp_path))


def test_folder_that_is_no_stick_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StickError, match=r"SHA256SUMS is missing; expected a folder that `echoquad pack` wrote"):
            verify_stick(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize(
    ("names", "message"), [(["a", "A"], "other case"), (["a\nb"], "file name"), (["-rf"], "file name")]
)
def test_names_that_a_usb_stick_cannot_hold_are_not_written(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(StickError, match=message):
        write_sums(tmp_path)
