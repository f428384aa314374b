"""The metrics: what they count, that a Prometheus parser reads them, and that nothing from outside becomes a label."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from echoquad_serve.monitoring.metrics import FLAGS, LATENCY_BUCKETS, MAX_CLASSES, ServiceMetrics
from echoquad_serve.records import LOW_CONFIDENCE, Result

PATIENT = "DOE^JANE"


def samples(metrics: ServiceMetrics) -> dict[tuple[str, ...], float]:
    """Parse the text and return each sample by its name and the values of its labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, *sample.labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def result(rows: list[dict[str, Any]], **changes: Any) -> Result:
    values: dict[str, Any] = {
        **{"id": "0" * 32, "status": "done", "origin": "folder", "name": PATIENT, "received": 10.0, "finished": 10.5},
        **{"timings_ms": {"queue": 480.0, "predict": 20.0}, **changes},
    }
    return Result(rows=tuple(rows), **values)


def row(label: str, *flags: str, file: str = "a", **changes: Any) -> dict[str, Any]:
    return {"file": file, "pred_image": label, "flags": list(flags), **changes}


@pytest.fixture
def metrics() -> ServiceMetrics:
    found = ServiceMetrics(["pacs", "folder"])
    found.set_bundle(
        **{"name": "heart", "sha256": "ab" * 32, "device": "cpu", "provider": "CPU", "precision": "int8"},
        classes=["ASD", "NORM"],
    )
    return found


def test_results_are_counted_by_decision_flag_reason_and_code(metrics: ServiceMetrics) -> None:
    rows = [
        row("ASD", "blank", "tie"),
        row("NORM", file="b"),
        row("INDETERMINATE", file="c", abstained_because=LOW_CONFIDENCE),
    ]
    shadow = (row("ASD"), row("ASD", file="b"))
    metrics.observe_result(result(rows, shadow=shadow, failures=({"file": PATIENT, "code": "E_FRAME", "message": ""},)))
    found = samples(metrics)
    assert [found["echoquad_decisions_total", name] for name in ("ASD", "NORM", "INDETERMINATE")] == [1, 1, 1]
    assert [found["echoquad_flags_total", name] for name in ("blank", "tie")] == [1, 1]
    assert found["echoquad_abstentions_total", LOW_CONFIDENCE] == 1
    assert found["echoquad_failures_total", "E_FRAME"] == 1
    assert found["echoquad_results_total", "folder", "done"] == 1
    assert (found["echoquad_shadow_frames_total", "same"], found["echoquad_shadow_frames_total", "different"]) == (1, 1)
    assert found["echoquad_stage_seconds_sum", "queue"] == 0.48
    assert found["echoquad_stage_seconds_bucket", "0.5", "total"] == 1
    assert found["echoquad_stage_seconds_bucket", "0.25", "total"] == 0
    assert found["echoquad_bundle_info", "cpu", "heart", "int8", "CPU", "ab" * 32] == 1


def test_intake_delivery_http_live_and_readiness(metrics: ServiceMetrics) -> None:
    assert samples(metrics)["echoquad_objects_accepted_total", "dicom"] == 0
    metrics.observe_accepted("dicom")
    metrics.observe_refused("http", "E_QUEUE_FULL")
    metrics.observe_delivery("pacs", "postponed")
    metrics.observe_http("/api/v1/predict", 200, 0.004)
    metrics.observe_live(row("ASD"), 0.02, dropped=3)
    metrics.observe_live(None, 0, dropped=1)
    metrics.set_ready(True)
    found = samples(metrics)
    assert found["echoquad_objects_accepted_total", "dicom"] == 1
    assert found["echoquad_objects_refused_total", "http", "E_QUEUE_FULL"] == 1
    assert (found["echoquad_deliveries_total", "pacs", "postponed"], found["echoquad_ready",]) == (1, 1)
    assert found["echoquad_deliveries_total", "folder", "delivered"] == 0
    assert found["echoquad_http_request_seconds_count", "/api/v1/predict", "2xx"] == 1
    assert (found["echoquad_live_frames_total",], found["echoquad_live_frames_dropped_total",]) == (1, 4)
    assert found["echoquad_live_age_seconds_bucket", "0.02"] == 1
    metrics.set_ready(False)
    assert samples(metrics)["echoquad_ready",] == 0


def test_gauges_are_read_with_the_metrics_and_a_fault_leaves_them_out(metrics: ServiceMetrics, tmp_path: Path) -> None:
    destination = {"waiting": 4, "refused": 1, "oldest_s": 9.5, "last_error": PATIENT}
    status: dict[str, Any] = {"waiting": 2, "oldest_waiting_s": 1.5, "in_progress": 1, "full": False}
    status["destinations"] = {"pacs": destination, "unknown": destination}
    asked = []

    def ask() -> Mapping[str, Any]:
        asked.append(1)
        return status

    metrics.watch_queue(ask)
    metrics.watch_disk(tmp_path)
    assert asked == []
    found = samples(metrics)
    assert (found["echoquad_queue_objects",], found["echoquad_queue_oldest_seconds",]) == (2, 1.5)
    assert found["echoquad_undelivered_results", "pacs"] == 4
    assert found["echoquad_undelivered_oldest_seconds", "pacs"] == 9.5
    assert found["echoquad_refused_results", "pacs"] == 1
    assert ("echoquad_refused_results", "unknown") not in found
    assert found["echoquad_free_disk_bytes",] > 0
    status.clear()
    found = samples(metrics)
    assert ("echoquad_queue_objects",) not in found
    assert ("echoquad_ready",) in found


def test_what_a_part_logs_as_an_error_is_counted(metrics: ServiceMetrics) -> None:
    end = metrics.count_errors()
    logging.getLogger("echoquad_serve.outbox.delivery_worker").error("%s failed", PATIENT)
    logging.getLogger("echoquad_serve.outbox").warning("not an error")
    logging.getLogger(f"echoquad_serve.{PATIENT}").critical("of no part")
    metrics.watch_queue(dict)  # without the destinations
    metrics.render()
    end()
    logging.getLogger("echoquad_serve.outbox").error("after the end")
    counted = {
        name[1]: value for name, value in samples(metrics).items() if name[0] == "echoquad_internal_errors_total"
    }
    assert counted == {"outbox": 1, "other": 1, "monitoring": 1}


@given(text=st.text(max_size=30))
def test_nothing_from_outside_becomes_a_label(text: str) -> None:
    metrics = ServiceMetrics(["pacs"])
    text = f"{PATIENT}{text}"
    metrics.observe_accepted(text)
    metrics.observe_refused(text, text)
    before = len(samples(metrics))
    failure = {"file": text, "code": text, "message": text}
    rows = [row(text, text, file=text), row("INDETERMINATE", abstained_because=text)]
    metrics.observe_result(result(rows, origin=text, status=text, name=text, failures=(failure,)))
    metrics.observe_delivery(text, text)
    rendered = metrics.render()
    assert b"DOE" not in rendered
    assert len(samples(metrics)) - before < 40 + 4 * len(LATENCY_BUCKETS)


def test_number_of_time_series_has_a_bound(metrics: ServiceMetrics) -> None:
    for index in range(200):
        metrics.set_bundle(
            **{"name": str(index), "sha256": "ab" * 32, "device": "cpu", "provider": "CPU", "precision": "int8"},
            classes=[f"class {index}"],
        )
        metrics.observe_result(result([row(f"class {index}", f"flag {index}")]))
    found = samples(metrics)
    assert sum(name == "echoquad_decisions_total" for name, *_ in found) <= MAX_CLASSES + 2
    assert sum(name == "echoquad_flags_total" for name, *_ in found) == 1
    assert sum(name == "echoquad_bundle_info" for name, *_ in found) == 1


def test_known_flags_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs/reference/flags.md").read_text("utf-8")
    assert [flag for flag in FLAGS if f"`{flag}`" not in text] == []


def test_every_metric_is_documented(metrics: ServiceMetrics, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/reference/metrics.md").read_text("utf-8")
    metrics.watch_queue(lambda: {"waiting": 0, "full": False, "destinations": {}})
    metrics.watch_disk(tmp_path)
    metrics.watch_drift(lambda: {"alert": False, "frames": 0, "quantities": {}})
    families = text_string_to_metric_families(metrics.render().decode())
    names = {family.name for family in families if family.name.startswith("echoquad_")}
    names = {name for name in names if not name.endswith("_created")}
    shown = {f"{name}_total" if f"`{name}_total`" in text else name for name in names}
    assert [name for name in sorted(shown) if f"`{name}`" not in text] == []


def test_rendering_takes_milliseconds(metrics: ServiceMetrics) -> None:
    import time

    began = time.perf_counter()
    for _ in range(20):
        metrics.render()
    assert (time.perf_counter() - began) / 20 < 0.1
