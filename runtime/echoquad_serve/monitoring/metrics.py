"""The metrics of the service, for Prometheus.

No label has a value that comes from outside: flags, codes, reasons, classes and destinations that are not known count
as ``other``, so that no sender can make the number of time series grow, and no patient value becomes a label.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

import echoquad_runtime.errors
import echoquad_serve.errors
from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import INDETERMINATE
from echoquad_runtime.frames.quality_flags import (
    BLANK,
    COLOUR,
    NO_SIGNAL,
    REGION_CLAMPED,
    SATURATED,
    SCREEN,
    UNCROPPED,
)
from echoquad_runtime.predict.prediction import TIE
from echoquad_serve.records import ABSTENTIONS, Origin, Result

__all__ = ["CODES", "FLAGS", "OTHER", "ServiceMetrics"]

OTHER: Final = "other"
"""Label of everything that is not known."""

CODES: Final = frozenset(
    getattr(module, name).code
    for module in (echoquad_runtime.errors, echoquad_serve.errors)
    for name in module.__all__  # type: ignore[attr-defined,unused-ignore]
)
"""Error codes that are labels."""

FLAGS: Final = frozenset(
    {BLANK, *NO_SIGNAL, SATURATED, COLOUR, UNCROPPED, REGION_CLAMPED, SCREEN, "nan", TIE, UNLIKE_TRAINING}
)
"""Flags that are labels."""

OUTCOMES: Final = frozenset({"delivered", "postponed", "refused"})
"""Outcomes of an attempt to deliver a result."""

LATENCY_BUCKETS: Final = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.033, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0),
)
"""Seconds, from 1 ms to 60 s; 0.033 is one frame of a live source."""

MAX_CLASSES: Final = 32
"""Classes of all bundles since the start that are labels."""

logger = logging.getLogger(__name__)


class ServiceMetrics:
    """All metrics of a service, in a registry of their own. The methods may be called from any thread.

    Parameters
    ----------
    destinations
        Names of the configured destinations.
    """

    def __init__(self, destinations: Sequence[str] = ()) -> None:
        disable_created_metrics()  # the time of each counter's start, which doubles the answer and which nobody reads
        self.registry = registry = CollectorRegistry()
        self._destinations = frozenset(destinations)
        self._classes: dict[str, None] = {}
        self._lock = threading.Lock()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"echoquad_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"echoquad_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"echoquad_{name}_seconds", text, labels, registry=registry, buckets=LATENCY_BUCKETS)

        self._accepted = counter("objects_accepted", "Objects that are on the disk and in the queue.", "origin")
        self._refused = counter("objects_refused", "Objects that were not accepted, by error code.", "origin", "reason")
        self._results = counter("results", "Jobs that ended, by origin and status.", "origin", "status")
        self._stage = histogram("stage", "Time of a job in a stage: queue, predict, or total from acceptance.", "stage")
        self._http = histogram("http_request", "Time to answer an HTTP request.", "route", "status")
        self._decisions = counter("decisions", "Frames by decision.", "decision")
        self._flags = counter("flags", "Frames that have a flag.", "flag")
        self._abstentions = counter("abstentions", "Frames on which the model abstains, by reason.", "reason")
        self._failures = counter("failures", "Frames and objects without a decision, by error code.", "code")
        self._deliveries = counter("deliveries", "Attempts to deliver a result, by outcome.", "destination", "outcome")
        self._live = counter("live_frames", "Live frames that were decided.")
        self._dropped = counter(
            "live_frames_dropped", "Live frames that a newer one has replaced before it was decided."
        )
        self._age = histogram("live_age", "Age of a live frame, from capture to decision.")
        self._shadow = counter("shadow_frames", "Frames that a second bundle decided too.", "agreement")
        self._bundle = gauge(
            *("bundle_info", "The bundle in use, and what it runs on; the value is 1."),
            *("name", "sha256", "device", "provider", "precision"),
        )
        self._ready = gauge("ready", "1 if the service is ready, else 0.")
        self._errors = counter(
            "internal_errors", "Faults that a part of the service has caught, survived and logged.", "part"
        )
        ProcessCollector(registry=registry)

        for origin in get_args(Origin):  # a counter that exists from the start shows its first increment as a rate
            self._accepted.labels(origin)
        for name in self._destinations:
            for outcome in OUTCOMES:
                self._deliveries.labels(name, outcome)

    # Intake and results

    def observe_accepted(self, origin: str) -> None:
        """Count an accepted object."""
        self._accepted.labels(_known(origin, get_args(Origin))).inc()

    def observe_refused(self, origin: str, code: str) -> None:
        """Count an object that was not accepted, by the code of the error."""
        self._refused.labels(_known(origin, get_args(Origin)), _known(code, CODES)).inc()

    def observe_result(self, result: Result) -> None:
        """Count a result: its stages, decisions, flags, abstentions, failures, and disagreement of a second bundle."""
        self._results.labels(_known(result.origin, get_args(Origin)), _known(result.status, _STATUSES)).inc()
        for stage in ("queue", "predict"):
            if (milliseconds := result.timings_ms.get(stage)) is not None:
                self._stage.labels(stage).observe(milliseconds / 1000)
        self._stage.labels("total").observe(max(result.finished - result.received, 0.0))
        self.observe_rows(result.rows, result.shadow)
        for failure in result.failures:
            self._failures.labels(_known(failure.get("code"), CODES)).inc()

    def observe_rows(self, rows: Sequence[Mapping[str, Any]], shadow: Sequence[Mapping[str, Any]] = ()) -> None:
        """Count the decisions of frames, and how often a second bundle decided otherwise."""
        for row in rows:
            label = row.get("pred_image")
            self._decisions.labels(_known(label, (*self._classes, INDETERMINATE))).inc()
            for flag in row.get("flags") or ():
                self._flags.labels(_known(flag, FLAGS)).inc()
            if label == INDETERMINATE:
                self._abstentions.labels(_known(row.get("abstained_because"), ABSTENTIONS)).inc()
        others = {row.get("file"): row.get("pred_image") for row in shadow}
        for row in rows:
            if row.get("file") in others:
                same = others[row.get("file")] == row.get("pred_image")
                self._shadow.labels("same" if same else "different").inc()

    def observe_delivery(self, destination: str, outcome: str) -> None:
        """Count an attempt to deliver a result; `outcome` is one of `OUTCOMES`."""
        self._deliveries.labels(_known(destination, self._destinations), _known(outcome, OUTCOMES)).inc()

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request: the template of its route, not its path."""
        kind = f"{status // 100}xx" if 100 <= status < 600 else OTHER
        self._http.labels(route, kind).observe(seconds)

    def observe_live(self, row: Mapping[str, Any] | None, age_s: float, dropped: int = 0) -> None:
        """Count a decided live frame, with its age, and the frames that were dropped since the last call."""
        self._dropped.inc(max(dropped, 0))
        if row is not None:
            self._live.inc()
            self._age.observe(max(age_s, 0.0))
            self.observe_rows([row])

    def count_errors(self) -> Callable[[], None]:
        """Count from now on what the service logs as an error, by its part; return how to end that."""
        log, handler = logging.getLogger("echoquad_serve"), _ErrorCounter(self._errors)
        log.addHandler(handler)
        return lambda: log.removeHandler(handler)

    # State

    def set_bundle(
        self, *, name: str, sha256: str, device: str, provider: str, precision: str, classes: Sequence[str]
    ) -> None:
        """State the bundle in use; its classes become labels."""
        with self._lock:
            for label in classes:
                if len(self._classes) < MAX_CLASSES:
                    self._classes = {**self._classes, label: None}
            self._bundle.clear()
            self._bundle.labels(name, sha256, device, provider, precision).set(1)

    def set_ready(self, ready: bool) -> None:
        """State whether the service is ready."""
        self._ready.set(int(ready))

    def watch_queue(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Ask `status`, that of the job store, for the queue and the destinations whenever metrics are read."""
        self.registry.register(_Watched(lambda: _queue_gauges(status(), self._destinations)))

    def watch_disk(self, folder: Path) -> None:
        """Report the free space of the disk of a folder whenever metrics are read."""

        def free() -> Iterator[GaugeMetricFamily]:
            yield _family("free_disk_bytes", "Free space of the disk of the queue.", shutil.disk_usage(folder).free)

        self.registry.register(_Watched(free))

    def watch_drift(self, state: Callable[[], Mapping[str, Any] | None]) -> None:
        """Ask `state`, that of a drift monitor, whenever metrics are read. There are no metrics of drift while None."""
        self.registry.register(_Watched(lambda: _drift_gauges(state())))

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus, ``text/plain; version=0.0.4``."""
        text: bytes = generate_latest(self.registry)
        return text


_STATUSES: Final = ("done", "failed", "expired")
_PARTS: Final = frozenset(
    {"dicom_network", "http", "inference", "intake", "live", "monitoring", "outbox", "queue", "reports", "service"}
)
"""What the part of a fault may be: packages and modules of the service."""


class _ErrorCounter(logging.Handler):
    """Counts records of the level ERROR and above by the part of the service whose logger they come from."""

    def __init__(self, errors: Counter) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record."""
        self._errors.labels(_known(record.name.partition(".")[2].partition(".")[0], _PARTS)).inc()


class _Watched:
    """A collector that asks for its values when metrics are read. A fault leaves them out."""

    def __init__(self, read: Callable[[], Iterator[GaugeMetricFamily]]) -> None:
        self._read = read

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that registration does not ask for values yet."""
        return []

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the values."""
        try:
            return list(self._read())
        except Exception:
            logger.exception("a metric cannot be read")
            return []


def _known(value: object, known: Collection[str]) -> str:
    return value if isinstance(value, str) and value in known else OTHER


def _family(name: str, text: str, value: float | None = None, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"echoquad_{name}", text, value=value, labels=labels or None)


def _queue_gauges(status: Mapping[str, Any], destinations: Collection[str]) -> Iterator[GaugeMetricFamily]:
    yield _family("queue_objects", "Objects that wait for their result.", status["waiting"])
    yield _family("queue_oldest_seconds", "Time that the oldest of them waits.", status.get("oldest_waiting_s") or 0)
    yield _family("queue_in_progress", "Objects that are being decided.", status.get("in_progress") or 0)
    yield _family("queue_full", "1 if queue or disk are full, so that nothing is accepted.", int(bool(status["full"])))
    waiting = _family("undelivered_results", "Results that a destination has not yet.", labels=["destination"])
    oldest = _family("undelivered_oldest_seconds", "Time that the oldest of them waits.", labels=["destination"])
    refused = _family("refused_results", "Results that a destination refuses for good.", labels=["destination"])
    for name, entry in status.get("destinations", {}).items():
        if name in destinations:
            waiting.add_metric([name], entry["waiting"])
            oldest.add_metric([name], entry.get("oldest_s") or 0)
            refused.add_metric([name], entry.get("refused") or 0)
    yield from (waiting, oldest, refused)


def _drift_gauges(state: Mapping[str, Any] | None) -> Iterator[GaugeMetricFamily]:
    if state is None:
        return
    yield _family("drift_alert", "1 if the latest decisions differ from the validation figures.", int(state["alert"]))
    yield _family("drift_frames", "Results and live frames that are compared.", state["frames"])
    index = _family(
        "drift_index", "Population stability index, or difference in a share of frames.", labels=["quantity"]
    )
    threshold = _family("drift_threshold", "Index from which a quantity raises the alert.", labels=["quantity"])
    for name, quantity in state["quantities"].items():
        if quantity["index"] is not None:
            index.add_metric([name], quantity["index"])
            threshold.add_metric([name], quantity["threshold"])
    yield from (index, threshold)
