"""The CPU image, built by podman from a stick without a registry: its size, its confinement, and its answers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from ..debian import collect_wheels, make_debian, need, run, write_lock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MOST_BYTES = 250_000_000
CONTAINERFILE = Path(str(resources.files("echoquad_deploy.container"))) / "Containerfile"
# Of this process alone: other tests make containers, too.
NAME = f"echoquad-image-{os.getpid()}"
BASE, IMAGE = f"localhost/{NAME}-base", f"localhost/{NAME}"
# Limits that a container may have where the host may not raise its own.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")

POST = """
import json, sys, urllib.request
address = "http://127.0.0.1:8770/api/v1/"
if sys.argv[1] == "post":
    body = open("/frames/frame.png", "rb").read()
    question = urllib.request.Request(address + "predict?name=frame.png", body, {"Content-Type": "image/png"})
else:
    question = address + "results"
print(urllib.request.urlopen(question, timeout=60).read().decode())
"""


def podman(*words: str | Path, timeout: float = 300.0, code: int | None = 0) -> str:
    # crun refuses a host with both versions of cgroups.
    runtime = ["--runtime", "runc"] if shutil.which("runc") else []
    return run("podman", *runtime, *words, timeout=timeout, code=code)


def last_line(text: str) -> str:
    """Return the answer: podman complains before it of a host without systemd."""
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image, and remove it afterwards."""
    need("podman=podman", "mmdebstrap=mmdebstrap")
    folder = tmp_path_factory.mktemp("image")
    make_debian(folder / "debian.tar")
    collect_wheels(folder / "stick" / "wheels", "cpu,serve")
    write_lock(folder / "stick")
    podman("import", folder / "debian.tar", BASE)
    try:
        build = (
            "build",
            "--format",
            "docker",
            "--layers=false",
            "--network",
            "host",
            *LIMITS,
            "--build-arg",
            f"BASE={BASE}",
        )
        podman(*build, "--file", CONTAINERFILE, "--tag", IMAGE, folder / "stick", timeout=600)
        yield IMAGE
    finally:
        podman("rm", "--force", NAME, code=None)
        podman("rmi", "--force", IMAGE, BASE, code=None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def service(image: str, tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> Iterator[str]:
    """Start a container that is ready, without a network and with a read-only root."""
    for folder in (tiny_bundle, *tiny_bundle.iterdir()):
        folder.chmod(0o755)
    config, frames = tmp_path / "config", tmp_path / "one"
    for folder in (config, frames):
        folder.mkdir(mode=0o755)
    (config / "service.toml").write_text('[store]\nfolder = "/var/lib/echoquad/store"\nmin_free_mb = 0\n', "utf-8")
    shutil.copy(frames_folder / "b/5.png", frames / "frame.png")
    mounts = {tiny_bundle: "/bundle:ro", config: "/etc/echoquad:ro", frames: "/frames:ro", NAME: "/var/lib/echoquad"}
    volumes = [word for source, place in mounts.items() for word in ("--volume", f"{source}:{place}")]
    confined = ("--read-only", "--network", "none", "--cap-drop", "all", "--security-opt", "no-new-privileges")
    podman("run", "--detach", "--name", NAME, *LIMITS, *confined, "--memory", "1g", *volumes, image)
    try:
        wait_until_healthy()
        yield NAME
    finally:
        podman("rm", "--force", NAME, code=None)
        podman("volume", "rm", "--force", NAME, code=None)


def wait_until_healthy() -> None:
    for _ in range(120):
        if "starting" not in (text := podman("healthcheck", "run", NAME, code=None)) and not text.strip():
            return
        time.sleep(0.5)
    raise AssertionError(f"{text}\n{podman('logs', NAME)}")


def ask(what: str) -> dict[str, object]:
    answer: dict[str, object] = json.loads(last_line(podman("exec", NAME, "python", "-c", POST, what)))
    return answer


def test_image_takes_at_most_250_mb(image: str) -> None:
    assert int(last_line(podman("image", "inspect", "--format", "{{.Size}}", image))) <= MOST_BYTES


def test_service_decides_without_a_network_rights_or_a_writable_root(service: str) -> None:
    result = ask("post")
    assert result["status"] == "done", result
    status = podman("exec", service, "cat", "/proc/1/status")
    for line in ("Uid:\t10001\t10001", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        assert line in status
    for path in ("/opt/echoquad/x", "/etc/x", "/bundle/x"):
        assert "Read-only file system" in podman("exec", service, "touch", path, code=1)


def test_results_outlive_the_container_and_sigterm_stops_it_in_good_order(service: str) -> None:
    assert ask("post")["status"] == "done"
    begin = time.monotonic()
    podman("stop", "--time", "20", service)
    assert time.monotonic() - begin < 15
    assert last_line(podman("inspect", "--format", "{{.State.ExitCode}}", service)) == "143"
    podman("start", service)
    wait_until_healthy()
    results = ask("results")["results"]
    assert isinstance(results, list) and len(results) == 1


def test_health_check_fails_while_the_service_hangs(service: str) -> None:
    podman("kill", "--signal", "STOP", service)
    try:
        assert "timed out" in podman("exec", service, "python", "-m", "echoquad_deploy.container.health_check", code=1)
    finally:
        podman("kill", "--signal", "CONT", service)
    wait_until_healthy()
