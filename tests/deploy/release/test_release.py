"""``make release``: what it writes, what it refuses, and that nothing of the machine gets into its files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echoquad import __version__

ROOT = Path(__file__).parents[3]
NAMES = [
    "SHA256SUMS",
    f"echoquad-{__version__}-py3-none-any.whl",
    f"echoquad-{__version__}.cdx.json",
    f"echoquad-{__version__}.tar.gz",
]
DATE = "2026-11-27T12:00:00+0000"

for _package in ("build", "hatchling"):
    pytest.importorskip(_package)
pytestmark = [
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone of the repository"),
    pytest.mark.skipif(sys.platform == "win32", reason="make and umask are of POSIX"),
]


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE}
    command = ["git", "-C", str(folder), "-c", "core.autocrlf=false", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", env=os.environ | identity | dates
    ).stdout.strip()


def commit(folder: Path, message: str = "Release") -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def make_clone(folder: Path) -> Path:
    """Copy the files of the checkout that git knows or would add, with a section of the version in the changelog."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # not one that is deleted and not committed yet
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if f"## [{__version__}] - " not in (folder / "CHANGELOG.md").read_text("utf-8"):
        edit(folder / "CHANGELOG.md", "## [Unreleased]\n", f"## [Unreleased]\n\n## [{__version__}] - 2026-11-27\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def release(
    clone: Path, *arguments: str | Path, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the release script of a clone as ``make release`` does, with the clone's own packages."""
    path = os.pathsep.join(str(clone / part) for part in ("", "runtime", "train", "export"))
    return subprocess.run(
        [sys.executable, str(clone / "export" / "release.py"), *map(str, arguments)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        umask=umask,
    )


def refused(clone: Path, *arguments: str | Path) -> str:
    """Return the one line of a release that is refused; nothing is written."""
    ended = release(clone, *arguments)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error[E_")
    assert not (clone / "dist" / "SHA256SUMS").exists()
    return line


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that can be released."""
    return make_clone(tmp_path_factory.mktemp("clone") / "echoquad")


@pytest.fixture
def changed(clone: Path) -> Iterator[Callable[[str, str, str], None]]:
    """Return a function that replaces words of a file of the clone and commits; the commits are undone."""
    before = git(clone, "rev-parse", "HEAD")

    def change(name: str, old: str, new: str) -> None:
        edit(clone / name, old, new)
        commit(clone)

    yield change
    git(clone, "reset", "--quiet", "--hard", before)


@pytest.fixture(scope="module")
def released(clone: Path) -> Path:
    """The folder of a release with a signature."""
    key = clone.parent / "key.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)], check=True)
    folder = clone.parent / "released"
    ended = release(clone, "--key", key, "--out", folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_release_has_wheel_source_bill_of_materials_and_sums(released: Path) -> None:
    assert sorted(path.name for path in released.iterdir()) == sorted([*NAMES, "SHA256SUMS.sig"])
    lines = (released / "SHA256SUMS").read_text("ascii").splitlines()
    assert lines == [f"{hashlib.sha256((released / name).read_bytes()).hexdigest()}  {name}" for name in NAMES[1:]]
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], check=False, cwd=released)
    assert checked.returncode == 0


def test_openssl_verifies_the_signature(released: Path) -> None:
    key, public = released.parent / "key.pem", released.parent / "pub.pem"
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(released / "SHA256SUMS.sig")]
    assert subprocess.run([*command, str(released / "SHA256SUMS")], check=False).returncode == 0
    assert subprocess.run([*command, str(released / NAMES[2])], check=False).returncode != 0


def test_bill_of_materials_has_the_hash_of_the_wheel(released: Path) -> None:
    wheel = hashlib.sha256((released / NAMES[1]).read_bytes()).hexdigest()
    text = (released / NAMES[2]).read_text("utf-8")
    assert wheel in text
    validators = pytest.importorskip("cyclonedx.validation.json")
    version = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    assert validators.JsonStrictValidator(version).validate_str(text) is None


@pytest.mark.slow
def test_release_on_another_machine_has_the_same_bytes(
    clone: Path, released: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Release the same commit from another path, with other file times, umask, locale, time zone and TMPDIR."""
    other = tmp_path / "a b" / "elsewhere"
    shutil.copytree(clone, other)
    for path in other.rglob("*"):
        if ".git" not in path.parts and path.is_file():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    (other / "dist.txt").write_text("a file that git does not know", "utf-8")
    (other / ".git" / "info" / "exclude").write_text("dist.txt\n", "ascii")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    surroundings = {"LC_ALL": "POSIX", "TZ": "ABC+11", "TMPDIR": str(temporary), "SOURCE_DATE_EPOCH": "1"}
    ended = release(other, umask=0o077, **surroundings)
    assert ended.returncode == 0, ended.stderr
    assert [(other / "dist" / name).read_bytes() for name in NAMES] == [
        (released / name).read_bytes() for name in NAMES
    ]
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_build_that_depends_on_the_machine_is_no_release(clone: Path, changed: Callable[[str, str, str], None]) -> None:
    """Make the build write the time zone into the wheel, as a careless hook does."""
    hook = "import os\nfrom hatchling.builders.hooks.plugin.interface import BuildHookInterface as Base\n\n\n"
    hook += "class Hook(Base):\n    def initialize(self, version, data):\n"
    hook += (
        "        path = os.path.join(self.directory, 'zone.txt')\n        os.makedirs(self.directory, exist_ok=True)\n"
    )
    hook += "        open(path, 'w').write(os.environ['TZ'])\n"
    hook += "        data['force_include'][path] = 'echoquad/zone.txt'\n"
    (clone / "export" / "hook.py").write_text(hook, "utf-8")
    wheel = "[tool.hatch.build.targets.wheel]"
    changed("pyproject.toml", wheel, f'[tool.hatch.build.targets.wheel.hooks.custom]\npath = "export/hook.py"\n{wheel}')
    ended = release(clone)
    assert ended.returncode == 3, ended.stderr
    assert f"{NAMES[1]}: a second build has other bytes" in ended.stderr
    assert not (clone / "dist").exists()


@pytest.mark.slow
def test_source_distribution_that_lacks_a_module_is_no_release(
    clone: Path, changed: Callable[[str, str, str], None]
) -> None:
    changed("pyproject.toml", '"/echoquad", "/train", "/export"', '"/echoquad", "/train"')
    ended = release(clone)
    assert ended.returncode in (1, 3)  # the folder is missing: the build fails, or the wheel differs
    assert not (clone / "dist").exists()


@pytest.mark.slow
def test_tests_of_the_source_distribution_can_be_collected(released: Path, tmp_path: Path) -> None:
    with tarfile.open(released / NAMES[3]) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / f"echoquad-{__version__}"
    path = os.pathsep.join(str(tree / part) for part in ("", "runtime", "train", "export"))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"],
        check=False,
        capture_output=True,
        encoding="utf-8",
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    collected = {line.partition("::")[0] for line in ended.stdout.splitlines() if "::" in line}
    tracked = {name for name in git(ROOT, "ls-files", "tests").splitlines() if re.search(r"/test_\w+\.py$", name)}
    assert len(tracked - collected) <= len(tracked) // 10  # those whose packages are not installed


def test_dirty_tree_is_refused(clone: Path) -> None:
    (clone / "new.txt").touch()
    try:
        assert "the working tree has changes (?? new.txt); commit" in refused(clone)
    finally:
        (clone / "new.txt").unlink()


def test_changelog_without_the_version_is_refused(clone: Path, changed: Callable[[str, str, str], None]) -> None:
    changed("CHANGELOG.md", f"## [{__version__}] - ", "## [0.0.1] - ")
    assert f"CHANGELOG.md: expected a section `## [{__version__}] - YYYY-MM-DD`" in refused(clone)


def test_changelog_with_an_empty_section_is_refused(clone: Path, changed: Callable[[str, str, str], None]) -> None:
    heading = f"## [{__version__}] - 2026-11-27\n"
    changed("CHANGELOG.md", heading, f"{heading}\n## [0.0.1] - 2026-01-01\n")
    assert "with entries" in refused(clone)


def test_citation_of_another_version_is_refused(clone: Path, changed: Callable[[str, str, str], None]) -> None:
    changed("CITATION.cff", f"version: {__version__}", "version: 0.0.9")
    assert "CITATION.cff states another version" in refused(clone)


def test_version_that_is_no_release_is_refused(clone: Path, changed: Callable[[str, str, str], None]) -> None:
    changed("runtime/echoquad_runtime/_version.py", __version__, f"{__version__}.dev0")
    assert "MAJOR.MINOR.PATCH" in refused(clone)


def test_tag_on_another_commit_is_refused_and_on_this_one_is_not(
    clone: Path, changed: Callable[[str, str, str], None]
) -> None:
    git(clone, "tag", f"v{__version__}")
    try:
        changed("README.md", "\n", "\n\n")
        assert f"the tag v{__version__} is on another commit" in refused(clone)
        git(clone, "tag", "--force", f"v{__version__}")
        out = clone.parent / "occupied"
        out.mkdir(exist_ok=True)
        (out / NAMES[1]).touch()
        assert f"{out.as_posix()} holds {NAMES[1]}" in refused(clone, "--out", out)
    finally:
        git(clone, "tag", "--delete", f"v{__version__}")


def test_key_that_cannot_be_read_is_refused_before_the_build(clone: Path) -> None:
    assert "E_CONFIG" in refused(clone, "--key", clone / "missing.pem")


def test_another_hatchling_than_that_of_the_lock_file_is_refused(
    clone: Path, changed: Callable[[str, str, str], None]
) -> None:
    changed("requirements-dev.lock", "\nhatchling==", "\nhatchling==0.")
    assert "hatchling" in refused(clone)


def test_newest_section_of_the_changelog_is_of_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert [heading for heading in headings if heading != "Unreleased"][:1] in ([], [__version__])


def test_make_release_runs_the_script() -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "release", "KEY=key.pem"], check=False, capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert "export/release.py --key key.pem" in printed.stdout
