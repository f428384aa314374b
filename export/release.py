"""Build a release of EchoQuad: ``make release``, or ``python export/release.py [--key KEY.pem] [--out dist]``.

Writes the source distribution, the wheel, a bill of materials and ``SHA256SUMS``, with a signature if a key is given.
What is built is the last commit, not the working tree. Nothing of the machine gets into the files: the commit is
built twice, the second time from the first source distribution, with another path, umask, locale and time zone. If one
byte differs, there is no release.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from echoquad_deploy.sbom import write_sbom
from echoquad_deploy.stick.sums import sign_sums, write_sums
from echoquad_runtime.bundle.signature import read_key
from echoquad_runtime.errors import ConfigError, EchoQuadError, HostError, VerificationError
from echoquad_runtime.storage.atomic_folder import atomic_folder

ROOT: Final = Path(__file__).resolve().parents[1]
VERSION_FILE: Final = "runtime/echoquad_runtime/_version.py"
# What a build may see of the machine. Each build has its own values, which must not matter.
SURROUNDINGS: Final[tuple[Mapping[str, str], ...]] = (
    {"LC_ALL": "C", "TZ": "UTC0", "PYTHONHASHSEED": "1", "umask": "022"},
    {"LC_ALL": "C.UTF-8", "TZ": "XYZ-9", "PYTHONHASHSEED": "2", "umask": "077"},
)


def git(*arguments: str) -> str:
    """Return what a git command prints.

    Raises
    ------
    HostError
        If git is missing or refuses.
    """
    try:
        ended = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True)
    except OSError as error:
        raise HostError(f"git cannot be started ({error.strerror}); install it") from error
    if ended.returncode:
        raise HostError(
            f"git {arguments[0]} failed ({_one_line(ended.stderr)}); release from a clone of the repository"
        )
    return ended.stdout.decode("utf-8", "replace").strip()


def read_version() -> str:
    """Return the version of the last commit, the only place of which is ``_version.py``.

    Raises
    ------
    ConfigError
        If the file has no version.
    """
    found = re.fullmatch(r'__version__ = "(\d+\.\d+\.\d+)"', git("show", f"HEAD:{VERSION_FILE}"))
    if found is None:
        raise ConfigError(f'{VERSION_FILE}: expected the one line __version__ = "MAJOR.MINOR.PATCH"')
    return found[1]


def check(version: str, out: Path) -> None:
    """Check that the last commit can be released.

    Raises
    ------
    ConfigError
        If the tree is dirty, a file states another version, the version is released already, or the tool that builds
        is not the one of the lock file.
    """
    if changed := git("status", "--porcelain").splitlines():
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(f"the working tree has changes ({changed[0].strip()}{more}); commit or remove them")
    if f"\nversion: {version}\n" not in git("show", "HEAD:CITATION.cff"):
        raise ConfigError(f"CITATION.cff states another version than {VERSION_FILE}; expected `version: {version}`")
    changelog = git("show", "HEAD:CHANGELOG.md")
    heading = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n+(?!## )\S", changelog, re.MULTILINE)
    newest = re.search(r"^## \[(?!Unreleased)([^\]]+)\]", changelog, re.MULTILINE)
    if heading is None or newest is None or newest[1] != version:
        raise ConfigError(
            f"CHANGELOG.md: expected a section `## [{version}] - YYYY-MM-DD` with entries, above the older versions"
        )
    tag = f"v{version}"
    if git("tag", "--list", tag) and git("rev-parse", f"{tag}^{{commit}}") != git("rev-parse", "HEAD"):
        raise ConfigError(f"the tag {tag} is on another commit; raise the version in {VERSION_FILE}")
    if out.exists() and (found := sorted(path.name for path in out.iterdir())):
        raise ConfigError(f"{out.as_posix()} holds {found[0]}; move what is in it away, or name another folder: --out")
    locked = re.search(r"^hatchling==(.+)$", git("show", "HEAD:requirements-dev.lock"), re.MULTILINE)
    if locked is None or metadata.version("hatchling") != locked[1]:  # it writes its version into the wheel
        raise ConfigError(
            f"hatchling {metadata.version('hatchling')} is installed, and requirements-dev.lock has another version; "
            "do: pip install -r requirements-dev.lock"
        )


def build(tree: Path, out: Path, epoch: str, surroundings: Mapping[str, str]) -> tuple[Path, Path]:
    """Build source distribution and wheel of a source tree, and return their paths.

    Raises
    ------
    HostError
        If a build fails.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "LANG"))}
    environment |= {"SOURCE_DATE_EPOCH": epoch, "TMPDIR": str(out.parent), **surroundings}
    umask = -1 if os.name == "nt" else int(environment["umask"], 8)
    for kind in ("--sdist", "--wheel"):  # each from the tree
        command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(tree)]
        ended = subprocess.run(command, check=False, capture_output=True, env=environment, cwd=out.parent, umask=umask)
        if ended.returncode:
            raise HostError(f"the build failed ({_one_line(ended.stdout + ended.stderr)}); correct pyproject.toml")
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def build_twice(folder: Path, version: str, epoch: str) -> tuple[Path, Path]:
    """Build the last commit, build it again from the source distribution, and compare the bytes.

    Raises
    ------
    VerificationError
        If a file differs: a build depends on the machine, or the source distribution is not complete.
    HostError
        If a build fails.
    """
    archive = folder / "commit.tar"
    git("archive", "--format=tar", f"--output={archive}", "HEAD")
    _extract(archive, folder / "first" / "tree")
    first = build(folder / "first" / "tree", folder / "first" / "out", epoch, SURROUNDINGS[0])
    _extract(first[0], folder / "second")
    second = build(folder / "second" / f"echoquad-{version}", folder / "second" / "out", epoch, SURROUNDINGS[1])
    for one, other in zip(first, second, strict=True):
        if (one.name, one.read_bytes()) != (other.name, other.read_bytes()):
            raise VerificationError(f"{one.name}: a second build has other bytes; compare {one} and {other}")
    return first


def write_release(out: Path, key: Path | None) -> list[str]:
    """Check the last commit, build it, and write the release into a folder; return the names of its files.

    Raises
    ------
    EchoQuadError
        If the commit cannot be released, or the release cannot be written. There is then no folder.
    """
    version = read_version()
    check(version, out)
    if key is not None:
        read_key(key, private=True)  # before the build, which takes seconds
    epoch = git("log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory(prefix="echoquad-release-") as temporary:
        files = build_twice(Path(temporary), version, epoch)
        with atomic_folder(out) as folder:
            for file in files:
                (folder / file.name).write_bytes(file.read_bytes())
            write_sbom(
                folder / f"echoquad-{version}.cdx.json",
                wheels=[folder / files[1].name],
                bundle=None,
                name="echoquad",
                version=version,
                time=datetime.fromtimestamp(int(epoch), UTC),
            )
            write_sums(folder)
            if key is not None:
                sign_sums(folder, key)
            return sorted(path.name for path in folder.iterdir())


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def _one_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description="Build a release of the last commit.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="default: dist")
    parser.add_argument("--key", type=Path, metavar="PEM", help="private key, elliptic-curve, that signs SHA256SUMS")
    options = parser.parse_args()
    try:
        names = write_release(options.out.absolute(), options.key)
    except EchoQuadError as error:
        sys.stderr.write(f"error[{error.code}]: {error}\n")
        return error.exit_code
    sys.stdout.write(f"wrote {', '.join(names)} into {options.out.as_posix()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
