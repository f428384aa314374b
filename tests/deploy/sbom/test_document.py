"""The bill of materials: the schema, hashes, licences, the graph of dependencies, and the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment

from echoquad_deploy.sbom import write_sbom
from echoquad_deploy.sbom.dependencies import target_environment
from echoquad_runtime.errors import BundleTamperedError, ConfigError, MissingExtraError

MakeWheel = Callable[..., Path]

APP = [
    "Summary: An  application",
    "License-Expression: apache-2.0 or mit",
    "Requires-Dist: Lib_One>=1",
    "Requires-Dist: win-only; sys_platform == 'win32'",
    "Requires-Dist: old-python; python_version < '3.12'",
    "Requires-Dist: fast-one[turbo]>=1; extra == 'fast'",
    "Requires-Dist: app[fast]; extra == 'all'",
    "Requires-Dist: tester; extra == 'dev'",
    "Requires-Dist: lib-two; extra == 'dev'",
    "Provides-Extra: fast",
    "Provides-Extra: all",
    "Provides-Extra: dev",
]
FAST = [
    "Requires-Dist: engine; extra == 'turbo'",
    "Requires-Dist: absent; extra == 'slow'",
    "Requires-Dist: lib-two; extra == 'more'",  # it is there, but nobody asks for this extra
    *(f"Provides-Extra: {name}" for name in ("turbo", "slow", "more")),
]


@pytest.fixture
def wheels(make_wheel: MakeWheel) -> list[Path]:
    """An application for Python 3.12 on 64-bit Arm, with what its extras ``fast`` and ``all`` need."""
    return [
        make_wheel("app", lines=APP),
        make_wheel("lib-one", "1.2+cpu", lines=["License: MIT", "Requires-Dist: lib-two"]),
        make_wheel("lib-two", lines=["License: Apache 2.0", "Classifier: License :: OSI Approved :: Apache License"]),
        make_wheel("fast-one", "2.0", tag="cp312-cp312-manylinux_2_28_aarch64", lines=FAST),
        make_wheel("engine", tag="cp39-abi3-manylinux_2_28_aarch64", lines=[f"License: {'all the text ' * 50}"]),
    ]


def write(path: Path, **changes: Any) -> dict[str, Any]:
    write_sbom(path, **{"bundle": None, "name": "thing", "version": "1", **changes})
    loaded: dict[str, Any] = json.loads(path.read_bytes())
    return loaded


def components(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in document["components"]}


def edges(document: Mapping[str, Any]) -> dict[str, set[str]]:
    """The edges by the names of the packages."""
    names = {component["bom-ref"]: component["name"] for component in document["components"]}
    names[document["metadata"]["component"]["bom-ref"]] = "subject"
    return {names[it["ref"]]: {names[other] for other in it["dependsOn"]} for it in document["dependencies"]}


def test_document_passes_the_strict_schema(tmp_path: Path, wheels: list[Path], tiny_bundle: Path) -> None:
    """Ask the reference library of CycloneDX, which is another implementation."""
    validators = pytest.importorskip("cyclonedx.validation.json")
    version = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    path = tmp_path / "sbom.cdx.json"
    write(path, wheels=wheels, bundle=tiny_bundle, time=datetime(2026, 11, 27, tzinfo=UTC))
    validator = validators.JsonStrictValidator(version)
    assert validator.validate_str(path.read_text("utf-8")) is None
    assert validator.validate_str(path.read_text("utf-8").replace("SHA-256", "SHA-257")) is not None


def test_wheel_has_its_hash_licence_and_package_url(tmp_path: Path, wheels: list[Path]) -> None:
    found = components(write(tmp_path / "s.json", wheels=wheels))
    assert list(found) == sorted(found)
    for path in wheels:
        name = path.name.partition("-")[0].replace("_", "-")
        assert found[name]["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]
        assert found[name]["bom-ref"] == path.name
    assert found["app"]["purl"] == "pkg:pypi/app@1.0"
    assert found["lib-one"]["purl"] == "pkg:pypi/lib-one@1.2%2Bcpu"
    assert found["app"]["description"] == "An application"
    licences = {name: [{**it.get("license", it)} for it in part.get("licenses", [])] for name, part in found.items()}
    assert licences == {
        "app": [{"expression": "Apache-2.0 OR MIT", "acknowledgement": "declared"}],
        "lib-one": [{"expression": "MIT", "acknowledgement": "declared"}],
        "lib-two": [{"name": "Apache License", "acknowledgement": "declared"}],
        "fast-one": [],
        "engine": [],
    }


def test_dependencies_are_those_of_the_target_and_of_the_extras_that_are_there(
    tmp_path: Path, wheels: list[Path]
) -> None:
    document = write(tmp_path / "s.json", wheels=wheels)
    assert edges(document) == {
        "subject": {"app"},
        "app": {"lib-one", "fast-one"},  # not lib-two, which only the extra dev asks for
        "lib-one": {"lib-two"},
        "lib-two": set(),
        "fast-one": {"engine"},
        "engine": set(),
    }
    assert document["compositions"][0]["aggregate"] == "complete"
    older = write(tmp_path / "s.json", wheels=wheels, environment=target_environment(["a-1-cp311-cp311-win_amd64.whl"]))
    assert [it["value"] for it in older["metadata"]["properties"]] == ["old-python", "win-only"]
    assert older["compositions"][0]["aggregate"] == "incomplete"


def test_extras_that_were_asked_for_are_followed(tmp_path: Path, wheels: list[Path]) -> None:
    """Among them those that an extra asks for itself: ``all`` needs ``fast``, which needs ``turbo`` of another."""
    assert edges(write(tmp_path / "s.json", wheels=wheels, extras=["all"]))["app"] == {"lib-one", "fast-one"}
    bare = write(tmp_path / "s.json", wheels=wheels, extras=[])
    assert edges(bare)["app"] == {"lib-one"}
    assert edges(bare)["fast-one"] == set()  # nobody asks for its extra
    whole = write(tmp_path / "s.json", wheels=wheels, extras=["dev"])
    assert edges(whole)["app"] == {"lib-one", "lib-two"}
    assert [it["value"] for it in whole["metadata"]["properties"]] == ["tester"]


def test_graph_reaches_what_pip_installs(tmp_path: Path, make_wheel: MakeWheel) -> None:
    """Resolve the same folder with pip. It evaluates markers for the machine at hand only, so the graph does too."""
    pytest.importorskip("pip")
    for name, lines in {"app": APP, "fast-one": FAST, "lib-one": ["Requires-Dist: lib-two"]}.items():
        make_wheel(name, "1.0", lines=lines)
    for name in ("lib-two", "engine", "tester", "old-python", "win-only", "absent"):
        make_wheel(name)
    folder = tmp_path / "chosen"
    options = ["--no-index", "--find-links", str(tmp_path / "wheels"), "--disable-pip-version-check"]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "app[all]"],
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert ended.returncode == 0, ended.stderr
    environment = {key: str(value) for key, value in default_environment().items()}
    document = write(tmp_path / "s.json", wheels=list(folder.iterdir()), environment=environment)
    assert document["compositions"][0]["aggregate"] == "complete"
    found = edges(document)
    reached: set[str] = set()
    waiting = {"subject"}
    while waiting:
        reached |= (new := waiting - reached)
        waiting = {need for name in new for need in found[name]}
    assert reached == found.keys()
    assert {"app", "fast-one", "engine", "lib-one", "lib-two"} <= reached
    assert reached.isdisjoint({"tester", "absent"})


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", ("3.12", "linux", "aarch64")),
        ("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", ("3.11", "linux", "x86_64")),
        ("a-1-cp313-cp313-win_amd64.whl", ("3.13", "win32", "AMD64")),
        ("a-1-cp313-cp313-macosx_11_0_arm64.whl", ("3.13", "darwin", "arm64")),
        ("a-1-py3-none-any.whl", ("3.11", "linux", "x86_64")),
    ],
)
def test_target_is_read_from_the_tags(file: str, expected: tuple[str, str, str]) -> None:
    found = target_environment([file, "b-1-py3-none-any.whl"])
    assert (found["python_version"], found["sys_platform"], found["platform_machine"]) == expected


def test_bundle_is_a_model_with_the_hashes_of_its_files(tmp_path: Path, tiny_bundle: Path) -> None:
    document = write(tmp_path / "s.json", wheels=[], bundle=tiny_bundle)
    (model,) = document["components"]
    manifest = json.loads((tiny_bundle / "bundle.json").read_bytes())
    assert model["type"] == "machine-learning-model"
    assert model["hashes"][0]["content"] == manifest["manifest_sha256"]
    assert {file["name"]: file["hashes"][0]["content"] for file in model["components"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_bundle.iterdir()
    }
    assert model["modelCard"]["considerations"]["useCases"] == [manifest["intended_use"]]
    assert "licenses" not in model and "pedigree" not in model
    assert edges(document)["subject"] == {model["name"]}


def test_signature_of_a_bundle_is_among_its_files(tmp_path: Path, make_tiny_bundle: Callable[..., Path]) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    (bundle / "model.sig").write_bytes(b"a signature")
    (model,) = write(tmp_path / "s.json", wheels=[], bundle=bundle)["components"]
    hashes = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    assert hashes["model.sig"] == hashlib.sha256(b"a signature").hexdigest()


def test_pretrained_weights_are_ancestors_with_hash_and_licence(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path]
) -> None:
    """An ensemble whose members began from the same weights names them once."""
    origin = {"source": "weights-package 1.0", "sha256": "ab" * 32, "license": "Apache-2.0"}
    expected = {
        "type": "machine-learning-model",
        "name": "weights-package 1.0",
        "hashes": [{"alg": "SHA-256", "content": "ab" * 32}],
        "licenses": [{"license": {"name": "Apache-2.0"}}],
    }
    for number, training in enumerate(({"pretrained": origin}, {"members": 2 * [{"pretrained": origin}]})):
        bundle = make_tiny_bundle(tmp_path / f"b{number}", manifest={"training": training})
        (model,) = write(tmp_path / f"s{number}.json", wheels=[], bundle=bundle)["components"]
        assert model["pedigree"] == {"ancestors": [expected]}


def test_damaged_bundle_is_refused_and_nothing_is_written(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path]
) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    model = bundle / "model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleTamperedError):
        write(tmp_path / "s.json", wheels=[], bundle=bundle)
    assert not (tmp_path / "s.json").exists()


def test_same_content_gives_the_same_bytes(
    tmp_path: Path, wheels: list[Path], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    write(first, wheels=wheels, bundle=tiny_bundle)
    document = write(second, wheels=wheels[::-1], bundle=tiny_bundle)
    assert first.read_bytes() == second.read_bytes()
    assert document["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert "timestamp" not in write(second, wheels=wheels, bundle=tiny_bundle)["metadata"]


def test_serial_number_follows_the_content(tmp_path: Path, wheels: list[Path]) -> None:
    whole = write(tmp_path / "s.json", wheels=wheels)["serialNumber"]
    part = write(tmp_path / "s.json", wheels=wheels[1:])["serialNumber"]
    assert whole != part
    assert write(tmp_path / "s.json", wheels=wheels)["serialNumber"] == whole


def test_file_that_is_no_wheel_is_refused_by_name(tmp_path: Path, make_wheel: MakeWheel) -> None:
    damaged = make_wheel("damaged")
    damaged.write_bytes(b"no zip")
    renamed = make_wheel("other").rename(tmp_path / "wheels" / "renamed-1.0-py3-none-any.whl")
    text = tmp_path / "text.whl"
    text.touch()
    bad_need = make_wheel("needy", lines=["Requires-Dist: !!"])
    for path, words in [(damaged, "zip"), (renamed, "names other"), (text, "wheel"), (bad_need, "requirement")]:
        with pytest.raises(ConfigError, match=words) as caught:
            write(tmp_path / "s.json", wheels=[path])
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_package_that_is_there_twice_is_refused(tmp_path: Path, make_wheel: MakeWheel) -> None:
    with pytest.raises(ConfigError, match="twice"):
        write(tmp_path / "s.json", wheels=[make_wheel("one", "1.0"), make_wheel("one", "1.1")])


def test_time_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH"):
        write(tmp_path / "s.json", wheels=[])


def test_missing_packaging_is_one_line(tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("utils", "licenses", "requirements"):
        monkeypatch.setitem(sys.modules, f"packaging.{name}", None)
    with pytest.raises(MissingExtraError, match=r"echoquad\[deploy\]"):
        write(tmp_path / "s.json", wheels=[make_wheel("one")])
