"""A Debian for 64-bit Arm, whose programs qemu runs in namespaces of their own.

The kernel learns to start such programs (binfmt_misc) in a user namespace only, so that the machine stays as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from .sticks import Ran

QEMU = "/usr/bin/qemu-aarch64-static"
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
ENTER = f"""
set -e
read -r _
exec bash -c '
set -e
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf "%s" ":qemu-aarch64:M::{MAGIC}:{MASK}:{QEMU}:OF" >/proc/sys/fs/binfmt_misc/register
mount --rbind /dev "$1/dev"
mount --rbind /proc "$1/proc"
root=$1
shift
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@"
' sh "$@"
"""


def make_root(folder: Path) -> Path:
    """Unpack a Debian 12 for arm64; skip the test where that cannot be done.

    The packages are unpacked and not configured, which would take minutes under emulation.
    """
    for program in ("debootstrap", "dpkg-deb", "unshare", QEMU):
        if shutil.which(program) is None:
            pytest.skip(f"needs Debian's {program.rpartition('/')[2]}")
    command = ["debootstrap", "--foreign", "--arch=arm64", "--variant=minbase"]
    command += ["--include=python3,python3-venv,openssl", "bookworm", str(folder)]
    made = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=600)
    if made.returncode:
        pytest.skip(f"debootstrap cannot make a Debian here: {made.stdout[-200:]}")
    for package in sorted((folder / "var/cache/apt/archives").glob("*.deb")):
        unpack = f"dpkg-deb --fsys-tarfile {package} | tar -C {folder} -x --keep-directory-symlink -f -"
        subprocess.run(["bash", "-o", "pipefail", "-c", unpack], check=True, capture_output=True)
    if (folder / "proc").is_symlink():  # of the first stage
        (folder / "proc").unlink()
        (folder / "proc").mkdir()
    for name in ("passwd", "group"):
        shutil.copy(folder / f"usr/share/base-passwd/{name}.master", folder / "etc" / name)
    for name in ("shadow", "gshadow"):
        (folder / "etc" / name).touch(mode=0o640)
    return folder


def run_in(root: Path, *command: str, timeout: float = 900.0) -> Ran:
    """Run a command of the Arm system as its root, without a network; skip the test where that cannot be done."""
    unshare = ["unshare", "--user", "--mount", "--net", "--propagation", "private"]
    process = subprocess.Popen(
        [*unshare, "bash", "-c", ENTER, "sh", str(root), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    time.sleep(0.5)  # it is in its namespace then, and waits for a line
    try:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536")
    except OSError as error:
        process.kill()
        process.communicate()
        pytest.skip(f"no user namespace can be made here: {error}")
    out, err = process.communicate("\n", timeout)
    if "binfmt_misc" in err:
        pytest.skip(f"binfmt_misc cannot be used here: {err.strip()}")
    return Ran(process.returncode, out, err)
