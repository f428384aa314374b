"""The service put together: what its parts must agree on, with a real bundle and without a network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from echoquad_runtime._version import __version__
from echoquad_runtime.errors import BundleNotFoundError, FrameReadError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_serve.config import DestinationConfig, ServiceConfig, StoreConfig
from echoquad_serve.inference.bundle_records import BundleRecords
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Result
from echoquad_serve.service import BedsideService

Start = Callable[..., BedsideService]


@pytest.fixture
def start(tiny_bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """Return what starts a service on the store of the test, and waits until it is ready."""
    running: list[BedsideService] = []

    def begin(*destinations: DestinationConfig, discard: tuple[str, ...] = ()) -> BedsideService:
        store = StoreConfig(tmp_path / "store", min_free_mb=1, discard=discard)
        service = BedsideService(tiny_bundle, ServiceConfig(store=store, destination=destinations))
        running.append(service)
        service.start()
        end = time.monotonic() + 30
        while service.unready_reasons() and not service.fault and time.monotonic() < end:
            time.sleep(0.02)
        assert not service.unready_reasons()
        return service

    yield begin
    for service in running:
        service.close()


def offer(service: BedsideService, file: Path, name: str = "frame") -> Result:
    copy = service.incoming / f"test{file.suffix}"
    shutil.copyfile(file, copy)
    return service.predict(IncomingObject(copy, "http", name)).result(30.0)


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    Image.effect_noise((64, 48), 50).save(tmp_path / "frame.png")
    return tmp_path / "frame.png"


def test_dicom_object_of_any_intake_carries_the_uids_of_its_file(start: Start) -> None:
    file = Path(get_testdata_file("examples_ybr_color.dcm"))
    header = dcmread(file)
    result = offer(start(), file)
    assert (result.sop_class_uid, result.sop_instance_uid) == (header.SOPClassUID, header.SOPInstanceUID)


def test_what_is_no_dicom_has_no_uids(start: Start, frame: Path) -> None:
    assert offer(start(), frame).sop_instance_uid == ""


def test_picture_is_drawn_by_the_bundle_that_decided_and_needs_its_record(start: Start, frame: Path) -> None:
    service = start()
    result = offer(service, frame)
    assert service.overlay(result.id, 0, cam=False).startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        service.overlay(result.id, 1, cam=False)
    service.close()
    again = start()
    assert again.overlay(result.id, 0, cam=False).startswith(b"\x89PNG")


def test_record_of_a_bundle_outlasts_a_restart_and_damage_is_told(start: Start, frame: Path, tmp_path: Path) -> None:
    result = offer(start(), frame)
    folder = tmp_path / "store" / "bundles"
    sha256 = result.bundle["sha256"]
    found = BundleRecords(folder).find(sha256)
    assert found is not None and found.contract.sha256 == result.bundle["contract_hash"]
    assert BundleRecords(folder).find("../x") is None
    (folder / f"{sha256}.json").write_text('{"contract": {}, "codes": null}')
    assert BundleRecords(folder).find(sha256) is None


def test_result_of_an_unknown_bundle_is_not_drawn_with_another(start: Start, frame: Path, tmp_path: Path) -> None:
    service = start()
    result = offer(service, frame)
    service.close()
    (record,) = (tmp_path / "store" / "bundles").iterdir()
    again = start()
    again._records = BundleRecords(tmp_path / "elsewhere")
    with pytest.raises(FrameReadError, match="not known any more"):
        again.overlay(result.id, 0, cam=False)
    assert record.exists()


def test_results_for_a_removed_destination_are_kept_until_it_is_discarded(
    start: Start, frame: Path, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file, and no folder")
    service = start(DestinationConfig("files", "folder", path=blocker / "out"))
    offer(service, frame)
    service.close()
    without = start()
    assert without.status()["queue"]["destinations"]["files"]["waiting"] == 1
    without.close()
    assert "files" not in start(discard=("files",)).status()["queue"]["destinations"]


def test_refused_results_are_sent_again_on_request(start: Start) -> None:
    service = start()
    with pytest.raises(KeyError):
        service.retry("nowhere")


def test_object_that_crashed_the_service_three_times_fails_unread(start: Start, frame: Path, tmp_path: Path) -> None:
    store = JobStore(StoreConfig(tmp_path / "store", min_free_mb=1))
    copy = store.incoming / "bad.png"
    shutil.copyfile(frame, copy)
    job = store.accept(IncomingObject(copy, "http", "bad.png"))
    store.close()
    for _ in range(3):
        store = JobStore(StoreConfig(tmp_path / "store", min_free_mb=1))
        assert store.take(1, 1.0)
        noted = (tmp_path / "store" / "taken").read_bytes()
        store.close()
        (tmp_path / "store" / "taken").write_bytes(noted)  # as a killed process leaves it
    service = start()
    result = service._store.future(job.id).result(20.0)
    assert (result.status, [failure["code"] for failure in result.failures]) == ("failed", ["E_INTERRUPTED"])
    assert offer(service, frame).status == "done"


def test_decisions_about_tensors_are_counted_and_audited_and_not_kept(
    start: Start, frame: Path, tmp_path: Path
) -> None:
    service = start()
    predictor = service.predictor()
    predictions = [one for one in predictor.predict([frame, frame]) if isinstance(one, Prediction)]
    service.record(predictor, predictions, "127.0.0.1")
    label = predictions[0].label
    assert f'echoquad_decisions_total{{decision="{label}"}} 2.0' in service.metrics().decode()
    service.close()
    *_, entry, _ = map(json.loads, (tmp_path / "store" / "audit" / "audit-000001.jsonl").read_text().splitlines())
    assert (entry["event"], entry["sender"], entry["decisions"]) == ("decided", "127.0.0.1", {label: 2})
    assert entry["bundle"] == predictor.bundle.manifest["manifest_sha256"] and "job" not in entry


def test_audit_log_names_version_configuration_and_bundles(
    start: Start, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    service = start()
    first = service.info()["bundle"]["sha256"]
    service.load_bundle(make_tiny_bundle(tmp_path / "second", graph={"cam": True}))
    with pytest.raises(BundleNotFoundError):
        service.load_bundle(tmp_path / "none")
    service.close()
    lines = (tmp_path / "store" / "audit" / "audit-000001.jsonl").read_text().splitlines()
    started, loaded, swapped, refused, _ = map(json.loads, lines)
    assert started["version"] == __version__ and len(started["configuration"]) == 64
    assert loaded["bundle"] == swapped["previous_bundle"] == first and swapped["device"] == "cpu"
    assert (refused["event"], refused["code"]) == ("bundle_refused", "E_BUNDLE_NOT_FOUND")
