"""What a service answers about itself, reduced to what the fleet check shows.

Only the fields listed here are kept. Names of objects, senders and files are never among them, whatever a service
answers; texts are cut to a length.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import ssl
import time
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any, Final

from echoquad_deploy.fleet.addresses import BoxAddress
from echoquad_deploy.fleet.errors import NoAnswerError
from echoquad_deploy.fleet.http_request import Answer, get

__all__ = ["Box", "Destination", "ask_box"]

_MAX_TEXT: Final = 160
_MAX_DESTINATIONS: Final = 100
_SHA256: Final = re.compile("[0-9a-f]{64}")
_CODE: Final = re.compile("E_[A-Z_]{1,60}")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a service sends results.

    Attributes
    ----------
    name
        Its name in the configuration.
    waiting
        Results that it has not yet.
    oldest_s
        Seconds that the oldest of them waits.
    refused
        Results that it refuses for good.
    """

    name: str
    waiting: int
    oldest_s: float
    refused: int


@dataclass(frozen=True, slots=True)
class Box:
    """A service and what it answered.

    Attributes
    ----------
    url
        Where it was asked.
    error
        Why there is no answer; empty if there is one. All that follows is then empty.
    version
        Release of EchoQuad.
    bundle, bundle_sha256, contract_sha256
        Name and hashes of the bundle in use; empty if none is loaded.
    device, provider, precision
        What really runs.
    self_test
        Whether the self-test of the bundle has passed.
    ready, reasons
        Whether frames are decided, and why not.
    waiting, oldest_s, full
        Objects that wait for a decision, seconds that the oldest waits, and whether none is accepted.
    destinations
        Where results go.
    drift, drift_frames
        Whether the latest decisions differ from the validation figures of the bundle, and how many are compared; None
        if nothing is compared.
    clock_s
        Seconds that its clock is ahead of this one, to about 1.5 s; None if it states no time.
    answer_ms
        Milliseconds until its first answer was complete.
    findings
        What is wrong with it; see `echoquad_deploy.fleet.assessment`.
    notes
        What somebody should know, and is not wrong.
    """

    url: str
    error: str = ""
    version: str = ""
    bundle: str = ""
    bundle_sha256: str = ""
    contract_sha256: str = ""
    device: str = ""
    provider: str = ""
    precision: str = ""
    self_test: bool = False
    ready: bool = False
    reasons: tuple[str, ...] = ()
    waiting: int = 0
    oldest_s: float = 0.0
    full: bool = False
    destinations: tuple[Destination, ...] = ()
    drift: bool | None = None
    drift_frames: int | None = None
    clock_s: float | None = None
    answer_ms: float | None = None
    findings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Host and port."""
        return self.url.partition("://")[2]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def ask_box(address: BoxAddress, *, timeout: float, token: str | None, tls: ssl.SSLContext) -> Box:
    """Ask a service for status, info, readiness and metrics; one that does not answer is a box with an `error`.

    Parameters
    ----------
    address
        The service.
    timeout
        Seconds for all requests together.
    token
        Bearer token; None to send none.
    tls
        Checks the certificate, if the address is encrypted.
    """
    deadline = time.monotonic() + timeout

    def request(path: str) -> Answer:
        return get(address, path, deadline, token, tls)

    try:
        asked, began = time.time(), time.monotonic()
        first = request("/api/v1/status")
        answer_ms = (time.monotonic() - began) * 1e3
        status = _json_of(first, token)
        queue, bundle = status.get("queue"), status.get("bundle") or {}
        if not isinstance(queue, dict) or not isinstance(bundle, dict) or not isinstance(status.get("ready"), bool):
            raise NoAnswerError("its status lacks ready, queue or bundle: it is no EchoQuad service; check the address")
        # A service that has loaded no bundle has no information on one.
        info = _json_of(request("/api/v1/info"), token) if bundle else {}
        ready = _json_of(request("/api/v1/ready"), token, HTTPStatus.SERVICE_UNAVAILABLE)
        metrics = _metrics_of(request("/metrics"))
    except NoAnswerError as error:
        return Box(address.url, error=str(error))
    known, versions = _object(info.get("bundle")), _object(info.get("versions"))
    reasons = ready.get("reasons")
    drift, frames = metrics.get("echoquad_drift_alert"), metrics.get("echoquad_drift_frames")
    return Box(
        address.url,
        version=_text(versions.get("echoquad")),
        bundle=_text(bundle.get("name")),
        bundle_sha256=_hash(bundle.get("sha256")),
        contract_sha256=_hash(known.get("contract_hash")),
        device=_text(bundle.get("device")),
        provider=_text(bundle.get("provider")),
        precision=_text(bundle.get("precision")),
        self_test=bundle.get("self_test") == "passed",
        ready=ready.get("ready") is True,
        reasons=tuple(map(_text, reasons[:10])) if isinstance(reasons, list) else (),
        waiting=_count(queue.get("waiting")),
        oldest_s=_number(queue.get("oldest_waiting_s")),
        full=queue.get("full") is True or metrics.get("echoquad_queue_full", 0) > 0,
        destinations=_destinations(status.get("destinations"), queue.get("destinations")),
        drift=None if drift is None else drift > 0,
        drift_frames=None if frames is None else int(frames),
        clock_s=_clock_difference(first, asked + answer_ms / 2e3),
        answer_ms=round(answer_ms, 1),
    )


def _json_of(answer: Answer, token: str | None, *statuses: int) -> dict[str, Any]:
    """Return the JSON object of an answer with status 200 or one of `statuses`.

    Raises
    ------
    NoAnswerError
        If it has another status, or is no JSON object.
    """
    try:
        content = json.loads(answer.body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        kind = answer.headers.get_content_type()
        raise NoAnswerError(f"it answers {answer.status} {kind[:40]}: it is no EchoQuad service; check the address")
    if answer.status in (HTTPStatus.OK, *statuses):
        return content
    error = _object(content.get("error"))
    code = str(error.get("code"))
    if not _CODE.fullmatch(code):
        raise NoAnswerError(f"it answers {answer.status}: it is no EchoQuad service; check the address")
    if answer.status == HTTPStatus.UNAUTHORIZED:
        advice = "it refuses the token" if token else "it wants a token; name the file with --token-file"
        raise NoAnswerError(f"it answers 401 {code}: {advice}")
    raise NoAnswerError(f"it answers {answer.status} {code}: {_text(error.get('message'))}")


def _metrics_of(answer: Answer) -> dict[str, float]:
    """Return the metrics without labels, by name; nothing if there are none."""
    found = {}
    if answer.status == HTTPStatus.OK:
        for name, value in re.findall(r"^(echoquad_\w+) (\S+)$", answer.body.decode("utf-8", "replace"), re.MULTILINE):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                found[name] = number
    return found


def _destinations(listed: object, stored: object) -> tuple[Destination, ...]:
    """Return the destinations: what is listed, with the age of the oldest result from the queue's figures."""
    ages = _object(stored)
    found = []
    for one in listed[:_MAX_DESTINATIONS] if isinstance(listed, list) else ():
        if isinstance(one, dict):
            name = one.get("name")
            oldest = _number(_object(ages.get(str(name))).get("oldest_s"))
            found.append(Destination(_text(name), _count(one.get("waiting")), oldest, _count(one.get("refused"))))
    return tuple(found)


def _clock_difference(answer: Answer, now: float) -> float | None:
    """Return the seconds that the clock of an answer is ahead of `now`, the middle of the request in Unix time."""
    try:
        stated = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp() + 0.5  # it has whole seconds
    except (TypeError, ValueError, OverflowError):
        return None
    return round(stated - now, 1)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return " ".join(value.split())[:_MAX_TEXT] if isinstance(value, str) else ""


def _hash(value: object) -> str:
    return value if isinstance(value, str) and _SHA256.fullmatch(value) else ""


def _number(value: object) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return round(float(value), 1) if valid else 0.0  # type: ignore[arg-type]


def _count(value: object) -> int:
    return max(0, int(_number(value)))
