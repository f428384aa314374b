"""Receivers of results that behave as told: a webhook, and an archive with storage commitment."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    SecondaryCaptureImageStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)


class Webhook:
    """Takes results, each once: a repeated Idempotency-Key has no further effect.

    Attributes
    ----------
    effects
        The body of each key, in the order of arrival.
    answers
        What is answered, by `behave`; counted.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.effects: dict[str, Any] = {}
        self.changed: list[str] = []  # keys that came with another body
        self.requests = 0
        self.answers: Counter[int] = Counter()
        self.pause_s = 0.0
        self._status, self._headers = 204, {}
        self._how = "answer"
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._server = self._listen(tls)
        self.port = int(self._server.server_address[1])
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}/results"

    def behave(self, how: str = "answer", status: int = 204, **headers: str) -> None:
        """Answer with a status and headers, ``hang``, or ``cut`` the connection, from now on."""
        self._how, self._status = how, status
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._released.set()
        self._released = threading.Event()

    def close(self) -> None:
        self.behave()
        self._server.shutdown()
        self._server.server_close()

    def _listen(self, tls: ssl.SSLContext | None) -> http.server.ThreadingHTTPServer:
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook._take(self, self.headers["Idempotency-Key"], json.loads(body))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                """A killed service cuts its connections."""

        server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _take(self, request: http.server.BaseHTTPRequestHandler, key: str, body: Any) -> None:
        time.sleep(self.pause_s)
        how, status, headers, released = self._how, self._status, self._headers, self._released
        with self._lock:
            self.requests += 1
            self.answers[status if how == "answer" else 0] += 1
            if how == "answer" and 200 <= status < 300 and self.effects.setdefault(key, body) != body:
                self.changed.append(key)
        if how == "hang":
            released.wait(60)
        if how != "answer":
            request.close_connection = True
            return
        request.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            request.send_header(name, value)
        request.end_headers()


class Archive:
    """A DICOM node that stores structured reports and secondary captures, and commits them.

    Attributes
    ----------
    objects
        What is stored, by SOP instance UID.
    changed
        UIDs that came again with other content.
    committed
        UIDs that were committed.
    """

    TITLE = "PACS"

    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, Dataset] = {}
        self.changed: list[str] = []
        self.committed: set[str] = set()
        self.stores = self.associations = 0
        self.port = port
        self._behaviour: str | int = 0x0000
        self._server: Any = None
        self._silent: socket.socket | None = None
        self._released = threading.Event()
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before."""
        entity = AE(ae_title=self.TITLE)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
        for sop_class in (ComprehensiveSRStorage, SecondaryCaptureImageStorage, StorageCommitmentPushModel):
            entity.add_supported_context(sop_class)
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_DATA_RECV, self._on_data),
        ]
        self._server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        self.port = int(self._server.server_address[1])

    def stop(self) -> None:
        """Refuse connections, as a host that restarts."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None
        if self._silent is not None:
            self._silent.close()
            self._silent = None

    def behave(self, behaviour: str | int = 0x0000) -> None:
        """From now on answer C-STORE with a status, ``reject``, ``cut`` mid-object, be ``slow``, or ``hang``."""
        self._behaviour = behaviour
        self._released.set()
        self._released = threading.Event()

    def hang(self) -> None:
        """Accept TCP connections and say nothing, until `stop`."""
        self.stop()
        self._silent = socket.create_server(("127.0.0.1", self.port), backlog=64)

    def close(self) -> None:
        self.behave()
        self.stop()

    def sources(self) -> Counter[tuple[str, str]]:
        """Count objects by kind, ``sr`` or ``sc``, and the UID of the object that they are about."""
        found: Counter[tuple[str, str]] = Counter()
        for data in self.objects.values():
            if data.SOPClassUID == ComprehensiveSRStorage:
                series = data.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
                found["sr", str(series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)] += 1
            else:
                found["sc", str(data.SourceImageSequence[0].ReferencedSOPInstanceUID)] += 1
        return found

    def _on_requested(self, event: Any) -> None:
        self.associations += 1
        if self._behaviour == "reject":
            event.assoc.acse.send_reject(0x02, 0x03, 0x02)  # transient, local limit exceeded
            event.assoc.kill()

    def _on_data(self, event: Any) -> None:
        # The first byte is the type of the PDU: 4 carries data.
        if self._behaviour == "cut" and event.data[:1] == b"\x04" and len(event.data) > 1000:
            raw = event.assoc.dul.socket.socket
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
                raw.shutdown(socket.SHUT_RDWR)

    def _on_store(self, event: Any) -> int:
        self.stores += 1
        behaviour = self._behaviour
        if behaviour == "hang":
            self._released.wait(60)
            return 0xA700
        if behaviour == "slow":
            self._released.wait(0.7)
            behaviour = 0x0000
        if isinstance(behaviour, str):
            return 0xA700
        if behaviour == 0x0000:
            data = event.dataset
            known = self.objects.setdefault(str(data.SOPInstanceUID), data)
            if known != data:
                self.changed.append(str(data.SOPInstanceUID))
        return behaviour

    def _on_action(self, event: Any) -> tuple[int, None]:
        request = event.action_information
        items = [(one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in request.ReferencedSOPSequence]
        threading.Thread(
            target=self._report, args=(event.assoc, str(request.TransactionUID), items), daemon=True
        ).start()
        return 0x0000, None

    def _report(self, association: Any, transaction: str, items: list[tuple[str, str]]) -> None:
        report = Dataset()
        report.TransactionUID = transaction
        report.ReferencedSOPSequence, report.FailedSOPSequence = [], []
        for sop_class, instance in items:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
            if instance in self.objects:
                report.ReferencedSOPSequence.append(item)
                self.committed.add(str(instance))
            else:
                item.FailureReason = 0x0112
                report.FailedSOPSequence.append(item)
        kind = 2 if report.FailedSOPSequence else 1
        if kind == 1:
            del report.FailedSOPSequence
        with contextlib.suppress(RuntimeError, ValueError):  # the service was killed meanwhile
            association.send_n_event_report(
                report, kind, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            )


class ResultFolder:
    """A folder as destination: what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ids(self) -> list[str]:
        """Return the ids of all results, by their files."""
        return sorted(path.stem for path in self.path.glob("*/*.json"))

    def rows(self) -> Counter[tuple[str, str]]:
        """Count the rows of the CSV files, by id and file."""
        import csv

        found: Counter[tuple[str, str]] = Counter()
        for path in self.path.glob("*.csv"):
            with path.open(newline="", encoding="utf-8") as stream:
                found.update((row["id"], row["file"]) for row in csv.DictReader(stream))
        return found

    def strangers(self) -> list[str]:
        """Return the names of files that are neither results nor rows, such as unfinished ones."""
        return [
            path.name
            for path in self.path.rglob("*")
            if path.is_file() and path.suffix not in (".json", ".csv") and path.name != ".echoquad.lock"
        ]


@contextlib.contextmanager
def receivers() -> Iterator[tuple[Webhook, Archive]]:
    webhook, archive = Webhook(), Archive()
    try:
        yield webhook, archive
    finally:
        webhook.close()
        archive.close()
