"""Tests of saved settings: save, load, validity on this host, precedence and damaged files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.errors import OutputError
from echoquad_runtime.tuning import saved_settings
from echoquad_runtime.tuning.saved_settings import (
    ResolvedSettings,
    RunConfig,
    delete,
    load,
    resolve_settings,
    save,
    settings_file,
)

CONFIG = RunConfig("cpu", "fp32", 2, False, 1)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    monkeypatch.setenv("ECHOQUAD_CONFIG_DIR", str(folder))
    return folder


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def test_save_and_load(config: Path, bundle: Bundle) -> None:
    assert load(bundle) == (None, "")
    path = save(bundle, CONFIG, goal="power", max_p99_ms=40.0, table=[{"verdict": "chosen"}])
    assert path == settings_file(bundle) == config / "tuning" / f"{bundle.manifest['manifest_sha256']}.json"
    saved, why = load(bundle)
    assert why == ""
    assert saved is not None
    assert (saved.config, saved.goal) == (CONFIG, "power")
    content = json.loads(path.read_text("utf-8"))
    assert content.keys() == {"schema", "bundle", "created", "goal", "max_p99_ms", "choice", "host", "table"}
    assert content["host"] == host_facts()
    assert (content["max_p99_ms"], content["table"]) == (40.0, [{"verdict": "chosen"}])
    save(bundle, RunConfig("cpu", "fp32", 1, False, 16), goal="throughput")  # replaces the first
    saved, _ = load(bundle)
    assert saved is not None
    assert saved.config.batch_size == 16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_settings_are_per_bundle(
    config: Path, bundle: Bundle, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    other = Bundle(make_tiny_bundle(tmp_path / "other", input_size=48))
    save(bundle, CONFIG, goal="latency")
    assert load(other) == (None, "")
    settings_file(bundle).rename(settings_file(other))
    saved, why = load(other)
    assert saved is None
    assert (
        "saved settings are ignored, the file is for another bundle; run echoquad tune again, or with --forget" in why
    )


def test_delete(config: Path, bundle: Bundle) -> None:
    assert delete(bundle) is None
    path = save(bundle, CONFIG, goal="latency")
    assert delete(bundle) == path
    assert delete(bundle) is None
    assert load(bundle) == (None, "")


@pytest.mark.parametrize("fact", ["CPU", "CPUs to use", "platform", "onnxruntime", "echoquad"])
def test_changed_host_ignores_settings(config: Path, bundle: Bundle, fact: str) -> None:
    path = save(bundle, CONFIG, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    content["host"][fact] = "a\nbetter 'one'"
    path.write_text(json.dumps(content))
    saved, why = load(bundle)
    assert saved is None
    assert why.startswith(f"{path.as_posix()}: saved settings are ignored, {fact} was a\\nbetter")
    assert f"and is {host_facts()[fact]} now" in why
    assert len(why.splitlines()) == 1
    del content["host"][fact]
    path.write_text(json.dumps(content))
    assert f"{fact} was None" in load(bundle)[1]


BROKEN = {
    "schema": 2,
    "choice": {"device": "cpu"},
    "goal": "beauty",
    "created": "yesterday",
    "host": None,
    "bundle": 7,
}


@pytest.mark.parametrize("key", BROKEN)
def test_malformed_content_is_ignored(config: Path, bundle: Bundle, key: str) -> None:
    path = save(bundle, CONFIG, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    for changed in ({**content, key: BROKEN[key]}, {name: content[name] for name in content if name != key}):
        path.write_text(json.dumps(changed))
        saved, why = load(bundle)
        assert saved is None
        assert "saved settings are ignored, " in why


@pytest.mark.parametrize(
    "change",
    [
        {"device": "auto"},
        {"device": "abacus"},
        {"device": 0},
        {"precision": "../fp32"},
        {"precision": None},
        {"precision": "int8"},  # not in this bundle
        {"precision": "bf16"},  # only on openvino
        {"precision": ["fp32"]},
        {"device": ["cpu"]},
        {"threads": 0},
        {"threads": True},
        {"threads": 10**9},
        {"spinning": 1},
        {"batch_size": "8"},
        {"batch_size": -1},
        {"more": 1},
    ],
    ids=str,
)
def test_config_out_of_range_is_ignored(config: Path, bundle: Bundle, change: dict[str, object]) -> None:
    path = save(bundle, CONFIG, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    content["choice"] |= change
    path.write_text(json.dumps(content))
    assert load(bundle)[0] is None
    assert "echoquad tune did not write this file" in load(bundle)[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5000), st.binary(max_size=8), st.integers(0, 8))
def test_damaged_file_never_raises(config: Path, bundle: Bundle, position: int, inserted: bytes, removed: int) -> None:
    path = save(bundle, CONFIG, goal="latency")
    data = path.read_bytes()
    position %= len(data)
    path.write_bytes(data[:position] + inserted + data[position + removed :])
    saved, why = load(bundle)
    assert (saved is None) == bool(why)
    assert len(why.splitlines()) <= 1
    found = resolve_settings(bundle)
    assert found.tuned == (saved is not None)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"schema": 1}'])
def test_foreign_file_is_ignored(config: Path, bundle: Bundle, data: bytes) -> None:
    path = settings_file(bundle)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert load(bundle)[0] is None
    assert "echoquad tune did not write this file" in load(bundle)[1]


def test_unusable_folder(config: Path, bundle: Bundle) -> None:
    config.write_text("a file, no folder")
    assert load(bundle) == (None, "")
    assert delete(bundle) is None
    with pytest.raises(OutputError, match=r"config/tuning: cannot be written \(Not a directory\)|cannot be written"):
        save(bundle, CONFIG, goal="latency")
    assert config.read_text() == "a file, no folder"
    config.unlink()
    settings_file(bundle).mkdir(parents=True)
    assert "saved settings are ignored, the file " in load(bundle)[1]
    with pytest.raises(OutputError):
        delete(bundle)


def test_settings_of_unavailable_device_are_ignored(
    config: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(bundle, RunConfig("cuda", "fp32", 1, False, 1), goal="latency")
    monkeypatch.setattr(saved_settings, "probe_devices", lambda: {"cpu": None, "cuda": "no driver"})
    assert "ignored, device cuda cannot be used: no driver; run echoquad tune again" in load(bundle)[1]
    assert resolve_settings(bundle).device == "auto"
    monkeypatch.setattr(saved_settings, "probe_devices", lambda: {"cpu": None})
    assert "this onnxruntime is built without it" in load(bundle)[1]
    monkeypatch.setattr(saved_settings, "probe_devices", lambda: {"cpu": None, "cuda": None})
    assert resolve_settings(bundle).device == "cuda"


def test_cpu_is_not_probed(config: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_settings, "probe_devices", lambda: pytest.fail("probed"))
    save(bundle, CONFIG, goal="latency")
    assert resolve_settings(bundle).tuned


def test_defaults_without_saved_settings(config: Path, bundle: Bundle) -> None:
    assert resolve_settings(bundle) == ResolvedSettings("auto", None, None, True, None, "", tuned=False)
    assert resolve_settings(bundle, device="cpu", precision="int8", threads=3, batch_size=5) == ResolvedSettings(
        "cpu", "int8", 3, True, 5, "", tuned=False
    )


def test_given_values_override_saved_settings(config: Path, bundle: Bundle) -> None:
    save(bundle, CONFIG, goal="latency")
    saved, _ = load(bundle)
    assert saved is not None
    day = saved.created[:10]
    tuned = resolve_settings(bundle)
    note = f"as tuned on {day} for latency: fp32 on cpu, 2 threads, not spinning, one frame at a time"
    assert tuned == ResolvedSettings("cpu", "fp32", 2, False, 1, note, tuned=True)
    assert resolve_settings(bundle, device="cpu", precision="fp32") == tuned
    given = resolve_settings(bundle, threads=1, batch_size=4)
    note = f"as tuned on {day} for latency: fp32 on cpu, 1 thread, 4 frames at a time"
    note += " (--threads and --batch-size as given)"
    assert given == ResolvedSettings("cpu", "fp32", 1, False, 4, note, tuned=True)
    for changes in ({"device": "auto"}, {"device": "cuda"}, {"precision": "int8"}):
        # The best thread count of one graph and device is not that of another.
        device, precision = changes.get("device"), changes.get("precision")
        note = f"the settings tuned on {day} for latency are for fp32 on cpu; they are not used"
        other = resolve_settings(bundle, device=device, precision=precision)  # type: ignore[arg-type]
        assert other == ResolvedSettings(device or "auto", precision, None, True, None, note, tuned=False)  # type: ignore[arg-type]
    assert resolve_settings(bundle, untuned=True) == ResolvedSettings("auto", None, None, True, None, "", tuned=False)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (RunConfig("cpu", "int8", 1, False, 1), "int8 on cpu, 1 thread, one frame at a time"),
        (RunConfig("cpu", "int8", 4, True, 16), "int8 on cpu, 4 threads, spinning, 16 frames at a time"),
        (RunConfig("openvino", "bf16", 4, False, 2), "bf16 on openvino, 4 threads, 2 frames at a time"),
    ],
)
def test_config_as_text(choice: RunConfig, words: str) -> None:
    assert str(choice) == words


def test_host_facts(tmp_path: Path) -> None:
    facts = host_facts()
    assert facts.keys() == {"CPU", "CPUs to use", "platform", "onnxruntime", "echoquad"}
    assert facts["CPUs to use"] == str(available_cpus())
    assert facts["onnxruntime"].startswith("onnxruntime")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast: 9000\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert host_facts(cpuinfo)["CPU"] == "Fast: 9000"
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n")
    assert host_facts(cpuinfo)["CPU"] == "implementer 0x41 part 0xd0b"
    assert host_facts(tmp_path / "none")["CPU"]


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"XDG_CONFIG_HOME": "/x"}, "/x/echoquad"),
        ("linux", {"XDG_CONFIG_HOME": "relative"}, "/home/u/.config/echoquad"),
        ("linux", {"ECHOQUAD_CONFIG_DIR": ""}, "/home/u/.config/echoquad"),
        ("linux", {"ECHOQUAD_CONFIG_DIR": "/own", "XDG_CONFIG_HOME": "/x"}, "/own"),
        ("darwin", {"XDG_CONFIG_HOME": "/x"}, "/home/u/Library/Application Support/EchoQuad"),
        ("win32", {"APPDATA": "/roaming"}, "/roaming/EchoQuad"),
        ("win32", {}, "/home/u/AppData/Roaming/EchoQuad"),
    ],
)
def test_settings_folder_by_platform(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], folder: str
) -> None:
    for name in ("ECHOQUAD_CONFIG_DIR", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: cls("/home/u")))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        found = settings_file(bundle)
    assert found.parent.parent == Path(folder)


def test_user_without_home_folder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ECHOQUAD_CONFIG_DIR")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(home))
    with pytest.raises(OutputError, match="set ECHOQUAD_CONFIG_DIR to a folder"):
        save(bundle, CONFIG, goal="latency")
    assert load(bundle) == (None, "")
