"""The power-on self-test: which frames it runs, when it fails, and how long a cached result is valid."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import GoldenFrames
from echoquad_runtime.devices import host_facts as facts
from echoquad_runtime.engine import self_test as module
from echoquad_runtime.engine.diagnostics import run_diagnostics
from echoquad_runtime.engine.io_binding import IoBinding
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import SelfTest, cached_self_tests
from echoquad_runtime.errors import BundleTamperedError, VerificationError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.verify.inspection import inspect_bundle

Make = Callable[..., Path]
NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX owners and modes")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache for each test."""
    monkeypatch.setenv("ECHOQUAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of frames of each run."""
    found: list[int] = []
    run = IoBinding.run

    def record(slot: IoBinding, batch: np.ndarray, frames: int) -> Any:
        found.append(frames)
        return run(slot, batch, frames)

    monkeypatch.setattr(IoBinding, "run", record)
    return found


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "self-tests").glob("*"))


def test_passed_self_test_is_cached_for_the_next_start(
    tiny_bundle: Path, runs: list[int], cache: Path, make_frame: Callable[..., np.ndarray]
) -> None:
    first = Predictor(tiny_bundle, device="cpu", threads=2)
    assert runs == [1, 1, 1]  # two golden frames, then the warm-up run
    assert first.self_test == "passed"
    runs.clear()
    second = Predictor(tiny_bundle, device="cpu", threads=2, warm_up=False)
    assert second(make_frame(0)) == first(make_frame(0))
    assert (runs, second.self_test) == ([1, 1], "passed")  # one run per frame, and no self-test
    assert len(cached_files(cache)) == 1


def test_worker_tests_every_bucket_before_its_first_frame(
    tiny_bundle: Path, runs: list[int], make_frame: Callable[..., np.ndarray]
) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=1, concurrent=True, batch_size=5)
    assert (runs, predictor.self_test) == ([], "")  # no slot has been tested yet
    results = predictor.predict_frames(make_frame(seed) for seed in range(12))
    next(results)
    assert runs[:9] == [1, 1, 2, 2, 4, 4, 5, 5, 5]
    assert predictor.self_test == "passed"
    results.close()  # type: ignore[attr-defined]


def test_changed_conditions_are_tested_again(
    tiny_bundle: Path, tmp_path: Path, make_tiny_bundle: Make, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts(bundle: Path, **options: Any) -> bool:
        runs.clear()
        Predictor(bundle, device="cpu", **{"threads": 1, "warm_up": True, **options})
        return len(runs) > 1

    both = make_tiny_bundle(tmp_path / "two", precisions=("fp32", "int8"))
    assert starts(tiny_bundle)
    assert not starts(tiny_bundle)
    assert starts(tiny_bundle, threads=2)
    assert starts(both)  # another bundle with the same graph
    assert starts(both, precision="int8")
    assert not starts(both, precision="int8")
    for name, value in (("cpu_model", lambda *_: "another CPU"), ("installed_wheels", lambda: {"onnxruntime": "9"})):
        with monkeypatch.context() as changed:
            changed.setattr(facts, name, value)
            assert starts(tiny_bundle)
            assert not starts(tiny_bundle)
    assert not starts(tiny_bundle)


@pytest.mark.parametrize("logits", ["reversed", "NaN"])
def test_failed_self_test_is_not_cached(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make, cache: Path, logits: str
) -> None:
    golden = Bundle(tiny_bundle).read_golden()
    wrong = golden.logits[..., ::-1] if logits == "reversed" else np.full_like(golden.logits, np.nan)
    folder = make_tiny_bundle(tmp_path / "bundle", golden=dataclasses.replace(golden, logits=wrong))
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"the self-test failed on cpu in fp32, in batches of 1: "):
            Predictor(folder, device="cpu")
    assert cached_files(cache) == []


def test_open_predictor_keeps_failing(
    tmp_path: Path, make_tiny_bundle: Make, make_frame: Callable[..., np.ndarray]
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle", graph={"logit_scale": 1.01})
    predictor = Predictor(folder, device="cpu", warm_up=False)
    for _ in range(3):
        with pytest.raises(VerificationError, match="the self-test failed"):
            predictor(make_frame(0))
    assert predictor.self_test == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"schema": 2, "self_test": "passed"}', b'{"schema": 1}', b"\xff", b" " * 100_000],
)
def test_damaged_cache_file_is_ignored(tiny_bundle: Path, cache: Path, runs: list[int], content: bytes) -> None:
    Predictor(tiny_bundle, device="cpu")
    (path,) = cached_files(cache)
    path.write_bytes(content)
    runs.clear()
    Predictor(tiny_bundle, device="cpu")
    assert len(runs) == 3
    assert json.loads(path.read_bytes())["self_test"] == "passed"


@NOT_ROOT
def test_cache_that_others_may_write_is_ignored(tiny_bundle: Path, cache: Path, runs: list[int]) -> None:
    Predictor(tiny_bundle, device="cpu")
    (path,) = cached_files(cache)
    for changed, mode, sound in ((path, 0o666, 0o600), (path.parent, 0o777, 0o700)):
        changed.chmod(mode)
        runs.clear()
        Predictor(tiny_bundle, device="cpu")
        assert len(runs) == 3
        changed.chmod(sound)


@pytest.mark.parametrize("where", ["", "/dev/null/none"])
def test_every_start_is_tested_without_a_cache(
    tiny_bundle: Path, runs: list[int], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHOQUAD_CACHE_DIR", where)
    for _ in range(2):
        runs.clear()
        assert Predictor(tiny_bundle, device="cpu").self_test == "passed"
        assert len(runs) == 3
    assert cached_self_tests() == []


def test_verified_signed_bundle_is_tested_at_every_start(tiny_bundle: Path, cache: Path) -> None:
    bundle = Bundle(tiny_bundle)
    bundle.signed_by = "a key"  # as after a successful verification
    engine = OnnxEngine(bundle, device="cpu")
    for _ in range(2):
        test = SelfTest(bundle, engine, 2)
        assert not test.cached
        test(engine.open_slot(2))
        assert test.passed
    assert cached_files(cache) == []


def test_cuda_is_tested_at_every_start(cuda_stand_in: Any, tiny_bundle: Path, cache: Path) -> None:
    for _ in range(2):
        cuda_stand_in.runs.clear()
        Predictor(tiny_bundle, device="cuda")
        assert len(cuda_stand_in.runs) == 3
    assert cached_files(cache) == []


def test_oldest_results_are_removed(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    for threads in range(1, 7):
        Predictor(tiny_bundle, device="cpu", threads=threads)
    assert len(cached_files(cache)) == 3
    assert [one["threads"] for one in cached_self_tests()][-1] == 6


def test_selected_frames_have_the_most_different_outputs(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    golden, selected = bundle.read_golden(), module._select_frames(bundle, "fp32")
    assert len(set(selected.names)) == module._FRAMES
    first, second = (golden.names.index(name) for name in selected.names[:2])
    p = golden.probabilities.reshape(len(golden.names), -1)
    distances = np.abs(p[:, None] - p[None]).max(axis=2)
    assert distances[first, second] == distances.max() > 0.1


def test_one_golden_frame_is_sufficient(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = Bundle(tiny_bundle).read_golden()
    one = GoldenFrames(golden.names[:1], golden.frames[:1], golden.logits[:1], golden.probabilities[:1])
    folder = make_tiny_bundle(tmp_path / "bundle", golden=one)
    assert Predictor(folder, device="cpu").self_test == "passed"


def test_changed_golden_frames_are_refused(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    path = folder / "golden.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleTamperedError, match=r"golden\.npz has"):
        Predictor(folder, device="cpu")


def test_inspect_and_diagnostics_list_cached_self_tests(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make
) -> None:
    def check() -> str:
        return next(check.detail for check in run_diagnostics("cpu").checks if check.name == "self-tests")

    assert inspect_bundle(tiny_bundle).self_tests == ()
    assert "None is remembered" in str(inspect_bundle(tiny_bundle).document.sections[-1])
    assert check().startswith("none saved on this host")
    Predictor(tiny_bundle, device="cpu", threads=2)
    (found,) = inspect_bundle(tiny_bundle).self_tests
    assert (found["precision"], found["device"], found["threads"], found["frames"]) == ("fp32", "cpu", 2, 1)
    assert found["created"] in str(inspect_bundle(tiny_bundle).document.sections[-1])
    digest = Bundle(tiny_bundle).manifest["manifest_sha256"]
    assert check() == f"1 passed on this host, the last: bundle {digest[:12]} in fp32 on cpu, {found['created']}"
    other = make_tiny_bundle(tmp_path / "bundle", classes=("A", "B", "C"))
    assert inspect_bundle(other).self_tests == ()
