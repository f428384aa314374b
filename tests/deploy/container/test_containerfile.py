"""The Containerfile, read as its builders read it: who runs, what is checked, and where it may write."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from pathlib import Path

FILE = Path(str(resources.files("echoquad_deploy.container"))) / "Containerfile"
GUIDE = Path(__file__).parents[3] / "docs/how-to/container.md"


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage, without comments and with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        else:
            found[name if len(found) > 1 else ""].append((word, " ".join(rest.split())))
    return found


def values(stage: str, word: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == word]


def test_both_images_run_as_an_unprivileged_user_and_check_their_health() -> None:
    assert list(stages())[-2:] == ["cuda", "cpu"]  # the last one is built unless another is named
    for stage in ("cuda", "cpu"):
        assert values(stage, "USER") == ["10001:10001"]
        (check,) = values(stage, "HEALTHCHECK")
        assert json.loads(check.partition("CMD ")[2]) == ["python", "-m", "echoquad_deploy.container.health_check"]
        assert json.loads(values(stage, "ENTRYPOINT")[0]) == ["echoquad"]
        assert json.loads(values(stage, "CMD")[0]) == ["serve", "/bundle", "--config", "/etc/echoquad/service.toml"]
        assert json.loads(values(stage, "VOLUME")[0]) == ["/bundle", "/etc/echoquad", "/var/lib/echoquad"]


def test_packages_come_from_the_stick_with_their_hashes_and_nothing_is_fetched_by_a_program() -> None:
    lines = values("build", "RUN")
    (install,) = [line for line in lines if "pip" in shlex.split(line.replace("&&", ";")) or "bin/pip " in line]
    assert {"--require-hashes", "--no-index"} <= set(install.split())
    text = FILE.read_text("utf-8")
    assert not re.search(r"\b(curl|wget|ADD)\b", text)
    for stage in ("build", "service"):
        assert all("--no-install-recommends" in line for line in values(stage, "RUN") if "apt-get install" in line)


def test_cuda_image_asks_the_host_for_what_computing_needs() -> None:
    (variables,) = [line for line in values("cuda", "ENV") if "NVIDIA" in line]
    names = dict(item.split("=") for item in variables.split())
    assert names == {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    assert not [line for line in values("cpu", "ENV") if "NVIDIA" in line]


def test_guide_names_the_file_and_runs_it_read_only() -> None:
    text = GUIDE.read_text("utf-8")
    assert "export/echoquad_deploy/container/Containerfile" in text
    runs = [block for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if "podman run" in block]
    assert runs and all("--read-only" in block and "--cap-drop all" in block for block in runs)
