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
from echoquad_runtime.tuning import saved_settings as host
from echoquad_runtime.tuning.saved_settings import (
    RunConfig,
    SavedSettings,
    choice_file,
    forget,
    keep,
    look_up,
    resolve_settings,
)

CHOICE = RunConfig("cpu", "fp32", 2, False, 1)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    monkeypatch.setenv("ECHOQUAD_CONFIG_DIR", str(folder))
    return folder


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def test_what_is_kept_is_found(config: Path, bundle: Bundle) -> None:
    assert look_up(bundle) == (None, "")
    path = keep(bundle, CHOICE, goal="power", max_p99_ms=40.0, table=[{"verdict": "chosen"}])
    assert path == choice_file(bundle) == config / "tuning" / f"{bundle.manifest['manifest_sha256']}.json"
    kept, why = look_up(bundle)
    assert why == ""
    assert kept is not None
    assert (kept.choice, kept.goal) == (CHOICE, "power")
    content = json.loads(path.read_text("utf-8"))
    assert content.keys() == {"schema", "bundle", "created", "goal", "max_p99_ms", "choice", "host", "table"}
    assert content["host"] == host_facts()
    assert (content["max_p99_ms"], content["table"]) == (40.0, [{"verdict": "chosen"}])
    keep(bundle, RunConfig("cpu", "fp32", 1, False, 16), goal="throughput")  # takes the place of the other
    kept, _ = look_up(bundle)
    assert kept is not None
    assert kept.choice.batch_size == 16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_bundle_has_a_file_of_its_own(
    config: Path, bundle: Bundle, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    other = Bundle(make_tiny_bundle(tmp_path / "other", input_size=48))
    keep(bundle, CHOICE, goal="latency")
    assert look_up(other) == (None, "")
    choice_file(bundle).rename(choice_file(other))
    kept, why = look_up(other)
    assert kept is None
    assert "the tuning is ignored, it is for another bundle; run echoquad tune again, or with --forget" in why


def test_forgetting(config: Path, bundle: Bundle) -> None:
    assert forget(bundle) is None
    path = keep(bundle, CHOICE, goal="latency")
    assert forget(bundle) == path
    assert forget(bundle) is None
    assert look_up(bundle) == (None, "")


@pytest.mark.parametrize("fact", ["CPU", "CPUs to use", "platform", "onnxruntime", "echoquad"])
def test_a_host_that_has_changed(config: Path, bundle: Bundle, fact: str) -> None:
    path = keep(bundle, CHOICE, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    content["host"][fact] = "a\nbetter 'one'"
    path.write_text(json.dumps(content))
    kept, why = look_up(bundle)
    assert kept is None
    assert why.startswith(f"{path.as_posix()}: the tuning is ignored, {fact} was a\\nbetter")
    assert f"and is {host_facts()[fact]} now" in why
    assert len(why.splitlines()) == 1
    del content["host"][fact]
    path.write_text(json.dumps(content))
    assert f"{fact} was None" in look_up(bundle)[1]


BROKEN = {
    "schema": 2,
    "choice": {"device": "cpu"},
    "goal": "beauty",
    "created": "yesterday",
    "host": None,
    "bundle": 7,
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_file_that_is_not_what_is_written(config: Path, bundle: Bundle, key: str) -> None:
    path = keep(bundle, CHOICE, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    for changed in ({**content, key: BROKEN[key]}, {name: content[name] for name in content if name != key}):
        path.write_text(json.dumps(changed))
        kept, why = look_up(bundle)
        assert kept is None
        assert "the tuning is ignored, it is " in why


@pytest.mark.parametrize(
    "change",
    [
        {"device": "auto"},
        {"device": "abacus"},
        {"device": 0},
        {"precision": "../fp32"},
        {"precision": None},
        {"precision": "int8"},  # this bundle has none
        {"precision": "bf16"},  # on openvino alone
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
def test_a_choice_that_cannot_be(config: Path, bundle: Bundle, change: dict[str, object]) -> None:
    path = keep(bundle, CHOICE, goal="latency")
    content = json.loads(path.read_text("utf-8"))
    content["choice"] |= change
    path.write_text(json.dumps(content))
    assert look_up(bundle)[0] is None
    assert "it is not what echoquad tune writes" in look_up(bundle)[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5000), st.binary(max_size=8), st.integers(0, 8))
def test_no_damage_is_ever_an_error(config: Path, bundle: Bundle, place: int, put: bytes, gone: int) -> None:
    path = keep(bundle, CHOICE, goal="latency")
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + put + data[place + gone :])
    kept, why = look_up(bundle)
    assert (kept is None) == bool(why)
    assert len(why.splitlines()) <= 1
    found = resolve_settings(bundle)
    assert found.tuned == (kept is not None)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"schema": 1}'])
def test_a_foreign_file(config: Path, bundle: Bundle, data: bytes) -> None:
    path = choice_file(bundle)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert look_up(bundle)[0] is None
    assert "it is not what echoquad tune writes" in look_up(bundle)[1]


def test_a_place_that_cannot_be(config: Path, bundle: Bundle) -> None:
    config.write_text("a file, no folder")
    assert look_up(bundle) == (None, "")
    assert forget(bundle) is None
    with pytest.raises(OutputError, match=r"config/tuning: cannot be written \(Not a directory\)|cannot be written"):
        keep(bundle, CHOICE, goal="latency")
    assert config.read_text() == "a file, no folder"
    config.unlink()
    choice_file(bundle).mkdir(parents=True)
    assert "the tuning is ignored, it " in look_up(bundle)[1]
    with pytest.raises(OutputError):
        forget(bundle)


def test_a_device_that_has_gone(config: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bundle, RunConfig("cuda", "fp32", 1, False, 1), goal="latency")
    monkeypatch.setattr(host, "probe_devices", lambda: {"cpu": None, "cuda": "no driver"})
    assert "ignored, its device cuda cannot be used: no driver; run echoquad tune again" in look_up(bundle)[1]
    assert resolve_settings(bundle).device == "auto"
    monkeypatch.setattr(host, "probe_devices", lambda: {"cpu": None})
    assert "this onnxruntime is built without it" in look_up(bundle)[1]
    monkeypatch.setattr(host, "probe_devices", lambda: {"cpu": None, "cuda": None})
    assert resolve_settings(bundle).device == "cuda"


def test_the_cpu_is_not_probed(config: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "probe_devices", lambda: pytest.fail("a probe takes time"))
    keep(bundle, CHOICE, goal="latency")
    assert resolve_settings(bundle).tuned


def test_nothing_kept_gives_the_defaults(config: Path, bundle: Bundle) -> None:
    assert resolve_settings(bundle) == SavedSettings("auto", None, None, True, None, "", tuned=False)
    assert resolve_settings(bundle, device="cpu", precision="int8", threads=3, batch_size=5) == SavedSettings(
        "cpu", "int8", 3, True, 5, "", tuned=False
    )


def test_what_is_given_wins_over_what_was_kept(config: Path, bundle: Bundle) -> None:
    keep(bundle, CHOICE, goal="latency")
    kept, _ = look_up(bundle)
    assert kept is not None
    day = kept.created[:10]
    tuned = resolve_settings(bundle)
    note = f"as tuned on {day} for latency: fp32 on cpu, 2 threads, not spinning, one frame at a time"
    assert tuned == SavedSettings("cpu", "fp32", 2, False, 1, note, tuned=True)
    assert resolve_settings(bundle, device="cpu", precision="fp32") == tuned
    given = resolve_settings(bundle, threads=1, batch_size=4)
    note = f"as tuned on {day} for latency: fp32 on cpu, 1 thread, 4 frames at a time"
    note += " (--threads and --batch-size as given)"
    assert given == SavedSettings("cpu", "fp32", 1, False, 4, note, tuned=True)
    for changes in ({"device": "auto"}, {"device": "cuda"}, {"precision": "int8"}):
        # Threads that suit one graph on one device say nothing about another.
        device, precision = changes.get("device"), changes.get("precision")
        note = f"the tuning of {day} for latency is for fp32 on cpu: it is not used"
        other = resolve_settings(bundle, device=device, precision=precision)  # type: ignore[arg-type]
        assert other == SavedSettings(device or "auto", precision, None, True, None, note, tuned=False)  # type: ignore[arg-type]
    assert resolve_settings(bundle, untuned=True) == SavedSettings("auto", None, None, True, None, "", tuned=False)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (RunConfig("cpu", "int8", 1, False, 1), "int8 on cpu, 1 thread, one frame at a time"),
        (RunConfig("cpu", "int8", 4, True, 16), "int8 on cpu, 4 threads, spinning, 16 frames at a time"),
        (RunConfig("openvino", "bf16", 4, False, 2), "bf16 on openvino, 4 threads, 2 frames at a time"),
    ],
)
def test_a_choice_in_words(choice: RunConfig, words: str) -> None:
    assert str(choice) == words


def test_the_facts(tmp_path: Path) -> None:
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
def test_where_it_is(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], folder: str
) -> None:
    for name in ("ECHOQUAD_CONFIG_DIR", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: cls("/home/u")))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        found = choice_file(bundle)
    assert found.parent.parent == Path(folder)


def test_a_user_without_a_home(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ECHOQUAD_CONFIG_DIR")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(home))
    with pytest.raises(OutputError, match="name one in the variable ECHOQUAD_CONFIG_DIR"):
        keep(bundle, CHOICE, goal="latency")
    assert look_up(bundle) == (None, "")
