"""The service: queue, inference, intake, destinations and monitoring, put together for the HTTP routes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from echoquad_runtime._version import __version__
from echoquad_runtime.errors import EchoQuadError, FrameReadError, OutputError
from echoquad_runtime.frames.sop_uids import sop_uids
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.config import DicomNodeConfig, LiveConfig, ServiceConfig
from echoquad_serve.errors import DeliveryRefusedError, IntakeError
from echoquad_serve.inference.bundle_records import BundleRecords
from echoquad_serve.inference.inference_worker import InferenceWorker
from echoquad_serve.inference.loaded_model import LoadedModel
from echoquad_serve.inference.model_manager import BundleFolder, ModelManager
from echoquad_serve.inference.row_picture import draw_row
from echoquad_serve.intake.watched_folder import WatchedFolder
from echoquad_serve.monitoring.audit_log import AuditLog, site_key
from echoquad_serve.monitoring.drift import DriftMonitor
from echoquad_serve.monitoring.metrics import ServiceMetrics
from echoquad_serve.outbox.destinations import open_destination
from echoquad_serve.outbox.outbox import Outbox
from echoquad_serve.queue import JobStore
from echoquad_serve.records import Delivery, IncomingObject, Job, Result

if TYPE_CHECKING:
    from echoquad_serve.dicom_network.node import DicomNode
    from echoquad_serve.live.live_view import LiveView

__all__ = ["BedsideService"]

logger = logging.getLogger(__name__)

_PRUNE_S: Final = 60.0
_STATUS_S: Final = 1.0

Listener = Callable[[str, dict[str, Any]], None]


class BedsideService:
    """Everything but the listener. It implements `echoquad_serve.http.backend.Backend`.

    Parameters
    ----------
    bundle
        The bundle to begin with.
    config
        The configuration.

    Attributes
    ----------
    fault
        Why the service cannot become ready; None if it can, or is.

    Raises
    ------
    EchoQuadError
        If the queue's folder, or a destination's configuration, cannot be used.
    """

    def __init__(self, bundle: Path, config: ServiceConfig) -> None:
        self._config = config
        names = [destination.name for destination in config.destination]
        self._store = JobStore(config.store, names)
        self.fault: EchoQuadError | None = None
        self._ready = False
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.metrics_registry = ServiceMetrics(names)
        self.metrics_registry.watch_queue(self._store.status)
        self.metrics_registry.watch_disk(config.store.folder)
        self._drift: DriftMonitor | None = None
        self.metrics_registry.watch_drift(self._drift_state)
        for name in config.store.discard:
            if count := self._store.discard(name):
                logger.warning("%d results for a removed destination are given up", count)
        self._audit = self._open_audit_log()
        self._records = BundleRecords(config.store.folder / "bundles")
        self._models = ModelManager(bundle, config.model, self._on_model)
        self._worker = InferenceWorker(self._store, self._models, every=config.model.every)
        self._store.on_result.append(self._on_result)
        self._node = None if config.dicom is None else self._dicom_node(config.dicom)
        commitments = None if self._node is None else self._node.reports
        self._outbox = Outbox(
            self._store,
            [(one, open_destination(one, self._records, commitments)) for one in config.destination],
            on_outcome=self._on_outcome,
        )
        self._folders = [
            WatchedFolder(one, self.submit, self._store.incoming, self._store.check_room) for one in config.folder
        ]
        self._live = None if config.live is None else self._live_view(config.live)
        self._bundles = BundleFolder(folder, self.load_bundle) if (folder := config.model.bundle_folder) else None
        self._dropped = 0  # live frames, until the latest decision
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Load the bundle in a thread, then begin to take objects in and to decide them."""
        for name, work in (("loading", self._load), ("upkeep", self._keep_up)):
            self._threads.append(threading.Thread(target=work, name=f"echoquad-{name}", daemon=True))
            self._threads[-1].start()

    def _load(self) -> None:
        try:
            self._models.start()
        except EchoQuadError as error:
            self.fault = error
            return
        self._worker.start()
        self._outbox.start()
        for folder in self._folders:
            folder.start()
        try:
            if self._node is not None:
                self._node.start()
            if self._live is not None:
                self._live.start()
        except EchoQuadError as error:  # a port that is taken, for example
            self.fault = error
            return
        if self._bundles is not None:
            self._bundles.start()
        self._ready = True
        self.metrics_registry.set_ready(True)
        self._tell("status", self.status())

    def close(self) -> None:
        """Stop taking objects in, finish the job at hand, and close the queue. What waits stays on the disk."""
        if self._closing.is_set():
            return
        self._ready = False
        self._closing.set()
        for part in (*self._folders, self._node, self._live, self._bundles, self._worker, self._outbox):
            if part is not None:
                part.close()
        self._note(lambda log: log.append("service_stopped"))
        if self._audit is not None:
            self._audit.close()
        self._store.close()

    def _keep_up(self) -> None:
        """Remove what every destination has, and send the status to whoever listens."""
        pruned = time.monotonic()
        while not self._closing.wait(_STATUS_S):
            try:
                if self._listeners:
                    self._tell("status", self.status())
                self._note(lambda log: log.flush())
                if time.monotonic() - pruned > _PRUNE_S:
                    pruned = time.monotonic()
                    self._store.prune(time.time())
            except Exception:
                logger.exception("upkeep failed")

    # ------------------------------------------------------------------------------------------ the routes' view

    @property
    def incoming(self) -> Path:
        """The folder for files that are being received."""
        return self._store.incoming

    def check_room(self, bytes_expected: int = 0) -> None:
        """Raise as `submit` if nothing of this size would be accepted."""
        self._store.check_room(bytes_expected)

    def unready_reasons(self) -> Sequence[str]:
        """Return why the service is not ready."""
        if self.fault is not None:
            return [str(self.fault)]
        if not self._ready:
            return ["the bundle is being checked and tested"]
        return [] if (fault := self._worker.fault) is None else [f"{fault}; restart the service"]

    def hang_reason(self) -> str | None:
        """Return why only a restart helps; None if the service works, is still loading or stops. Never waits."""
        return self._worker.fault if self._ready else None

    def info(self) -> dict[str, Any]:
        """Return the bundle, its contract, and what really runs."""
        return self._models.current.info()

    def status(self) -> dict[str, Any]:
        """Return the state of intake, queue, destinations and bundle."""
        reasons = list(self.unready_reasons())
        bundle: dict[str, Any] | None = None
        if self._models.ready:
            info = self._models.current.info()
            bundle = {key: info[key] for key in ("device", "provider", "precision", "self_test")} | info["bundle"]
        return {
            "intake": {
                "http": {},
                "folder": [one.status() for one in self._folders] or None,
                "dicom": None if self._node is None else self._node.status(),
            },
            "queue": self._store.status(),
            "destinations": self._outbox.status(),
            "bundle": bundle,
            "live": None if self._live is None else self._live.status(),
            "ready": not reasons,
            "reasons": reasons,
        }

    def submit(self, incoming: IncomingObject) -> Job:
        """Accept an object: on return it is on the disk and in the queue; raise IntakeError otherwise."""
        incoming = _with_uids(incoming)
        try:
            job = self._store.accept(incoming)
        except IntakeError as error:
            code = error.code
            self.metrics_registry.observe_refused(incoming.origin, code)
            self._note(lambda log: log.refused(incoming, code))
            raise
        self.metrics_registry.observe_accepted(job.origin)
        self._note(lambda log: log.accepted(job))
        return job

    def predict(self, incoming: IncomingObject) -> Future[Result]:
        """Accept an object and return the future of its result; see `JobStore.future`."""
        return self._store.future(self.submit(incoming).id)

    def result(self, identifier: str) -> Result | None:
        """Return the result of a job; None if there is none."""
        return self._store.result(identifier)

    def results(self, *, before: int | None = None, after: int = 0, limit: int = 100) -> list[Result]:
        """Return results by number; see `JobStore.results`."""
        return self._store.results(before=before, after=after, limit=limit)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each event; return how to unsubscribe."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.remove(listener)

        return unsubscribe

    def overlay(self, identifier: str, row: int, *, cam: bool) -> bytes:
        """Return the picture of a row with its evidence, as PNG; raise KeyError if there is no such row."""
        result, source = self._store.result(identifier), self._store.source(identifier)
        if result is None or not 0 <= row < len(result.rows):
            raise KeyError(identifier)
        if source is None:
            raise FrameReadError("the object is not kept any more; send it again")
        model = self._models.current
        if cam and result.bundle["sha256"] != model.sha256:
            raise FrameReadError("the bundle that decided is not in use any more; send the object again")
        return draw_row(result, row, source, self._records.of(result).contract, model.activation_map if cam else None)

    def live_frames(self) -> Iterator[bytes]:
        """Yield each new frame of the live source as JPEG; nothing without one."""
        return iter(()) if self._live is None else self._live.frames()

    def predictor(self) -> Predictor:
        """Return the predictor of the bundle in use."""
        return self._models.current.predictor

    def record(self, predictor: Predictor, predictions: Sequence[Prediction], sender: str) -> None:
        """Count and audit decisions that no job has."""
        model, now = self._models.owner(predictor), time.time()
        rows = tuple(model.row(prediction) for prediction in predictions)
        self.metrics_registry.observe_rows(rows)
        if self._drift is not None:
            self._drift.observe_result(rows)
        result = Result("", "done", "http", "", now, now, rows, bundle=model.identity(), sender=sender)
        self._note(lambda log: log.decided(result))

    def load_bundle(self, folder: Path) -> dict[str, Any]:
        """Swap to another bundle, and return `info`."""
        try:
            return self._models.load(folder).info()
        except EchoQuadError as error:
            code = error.code
            self._note(lambda log: log.append("bundle_refused", code=code))
            raise

    def roll_back(self) -> dict[str, Any]:
        """Swap back to the bundle before the one in use, and return `info`."""
        return self._models.roll_back().info()

    def retry(self, destination: str) -> int:
        """Send again what a destination has refused or that was postponed; raise KeyError if there is no such one."""
        return self._outbox.retry_refused(destination)

    def metrics(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return self.metrics_registry.render()

    # ------------------------------------------------------------------------------------------ events

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(name, data)
            except Exception:
                logger.exception("a listener failed")

    def _on_result(self, result: Result) -> None:
        self.metrics_registry.observe_result(result)
        if self._drift is not None:
            self._drift.observe_result(result.rows)
        self._note(lambda log: log.decided(result))
        self._tell("result", result.to_dict())

    def _drift_state(self) -> dict[str, Any] | None:
        return None if self._drift is None else self._drift.state()

    def _on_model(self, event: str, model: LoadedModel) -> None:
        self._drift = DriftMonitor(
            model.validation,
            vote=model.contract.vote,
            abstain_below=model.predictor.abstain_below,
            abstain_unlike=model.predictor.abstain_unlike,
            bundle_sha256=model.sha256,
            window=self._config.monitoring.drift_window,
        )
        self._records.keep(model)
        info, previous = model.info(), self._models.current.sha256 if self._models.ready else None
        runs = {name: info[name] for name in ("device", "provider", "precision")}
        self._note(lambda log: log.append(event, bundle=model.sha256, previous_bundle=previous, **runs))
        self.metrics_registry.set_bundle(
            name=model.folder.name,
            sha256=model.sha256,
            device=info["device"],
            provider=info["provider"],
            precision=info["precision"],
            classes=model.contract.classes,
        )

    def _on_outcome(self, destination: str, delivery: Delivery, error: Exception | None) -> None:
        refused = isinstance(error, DeliveryRefusedError)
        outcome = "delivered" if error is None else "refused" if refused else "postponed"
        self.metrics_registry.observe_delivery(destination, outcome)
        if error is None:
            self._note(lambda log: log.delivered(delivery.result, destination, delivery.attempts + 1))
        elif isinstance(error, DeliveryRefusedError):
            code = error.code
            self._note(lambda log: log.delivery_refused(delivery.result, destination, code))

    def _note(self, event: Callable[[AuditLog], object]) -> None:
        """Append to the audit log. If the disk refuses, the entry waits there, and the object goes its way."""
        if self._audit is None:
            return
        try:
            event(self._audit)
        except OutputError:
            logger.error("the audit log cannot be written; its entries wait in memory")

    # ------------------------------------------------------------------------------------------ parts

    def _open_audit_log(self) -> AuditLog | None:
        config = self._config.monitoring
        if not config.audit_log:
            return None
        key = site_key(config.site_key_file or self._config.store.folder / "site.key")
        dicom = self._config.dicom
        senders = [] if dicom is None else [caller.ae_title for caller in dicom.caller]
        log = AuditLog(self._config.store.folder / "audit", key, senders=senders)
        text = repr(self._config).encode("utf-8", "surrogatepass")
        log.append("service_started", version=__version__, configuration=hashlib.sha256(text).hexdigest())
        return log

    def _dicom_node(self, config: DicomNodeConfig) -> DicomNode:
        from echoquad_serve.dicom_network.node import DicomNode

        return DicomNode(
            config,
            self.submit,
            self._store.incoming,
            self._store.check_room,
            committed=self._store.holds,
            state=self._config.store.folder / "commitment",
        )

    def _live_view(self, config: LiveConfig) -> LiveView:
        from echoquad_serve.live.live_view import LiveView

        return LiveView(
            config,
            self.predictor,
            self._on_live,
            lambda _: self._tell("status", self.status()),
            to_row=lambda predictor, prediction: self._models.owner(predictor).row(prediction),
        )

    def _on_live(self, row: dict[str, Any]) -> None:
        age, dropped = float(row["age_ms"]), int(row["dropped"])
        self.metrics_registry.observe_live(row, age / 1e3, dropped - self._dropped)
        self._dropped = dropped
        if self._drift is not None:
            self._drift.observe_live(row)
        keys = ("captured", "age_ms", "dropped", "state")
        decision = {key: value for key, value in row.items() if key not in keys}
        event = {"row": decision, "captured": row["captured"], "age_ms": age, "dropped": dropped, "state": row["state"]}
        self._tell("live", event)


def _with_uids(incoming: IncomingObject) -> IncomingObject:
    """Return an object with the UIDs that its file states, unless the sender has named them."""
    if incoming.sop_instance_uid:
        return incoming
    try:
        sop_class_uid, sop_instance_uid = sop_uids(incoming.path)
    except EchoQuadError:  # the job reports why
        return incoming
    return dataclasses.replace(incoming, sop_class_uid=sop_class_uid, sop_instance_uid=sop_instance_uid)
