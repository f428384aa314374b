"""The OpenAPI description of the API; the tests hold it against the routes and against what they answer."""

from __future__ import annotations

from typing import Any, Final

from echoquad_runtime._version import __version__
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.openapi.schemas import SCHEMAS
from echoquad_serve.http.routes.parameters import MAX_INTEGER
from echoquad_serve.http.routes.results import MAX_LIMIT

__all__ = ["openapi_document"]

_Json = dict[str, Any]

_DESCRIPTION: Final = (
    "Decide echocardiography frames at the bedside. For research use only. Requests from other machines need a bearer "
    "token or a client certificate. The KServe v2 protocol is served below /v2."
)

_ERRORS: Final = {
    "400": "A parameter, a header or the body is invalid.",
    "401": "The request comes from another machine and has no valid token.",
    "403": "The request comes from a page of another origin, or from another machine while no token is configured.",
    "404": "There is nothing of that name.",
    "405": "The path has other methods.",
    "408": "The body came too slowly.",
    "409": "The bundle cannot be changed now, or there is none to go back to.",
    "413": "The body is too large.",
    "415": "The Content-Type is not accepted.",
    "421": "The Host header is not a name of this service.",
    "422": "The service does not accept the content.",
    "429": "Too many requests, or the queue is full; Retry-After says when to try again.",
    "431": "The headers are too large, or too many.",
    "500": "The service has a fault.",
    "503": "The service cannot serve the request now; Retry-After says when to try again.",
    "504": "There is no result in time; the object stays in the queue.",
}
_EVERYWHERE: Final = ("400", "401", "403", "405", "408", "413", "421", "431", "500")
_RETRY: Final = {"429", "503", "504"}

_IDENTIFIER: Final[_Json] = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "Number of an object: 32 hexadecimal digits.",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "example": "0123456789abcdef0123456789abcdef",
}
_CAM: Final[_Json] = {
    "name": "cam",
    "in": "query",
    "description": "1 colours the picture by the evidence (class activation maps).",
    "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
}
_BINARY: Final[_Json] = {"schema": {"type": "string", "format": "binary"}}


def openapi_document(config: HttpConfig) -> _Json:
    """Return the description, which is JSON as OpenAPI 3.1 wants it."""
    operations: _Json = {
        "/api/v1/live": {"get": _get("isLive", "Return that the process serves requests.", "Live")},
        "/api/v1/ready": {"get": _ready()},
        "/api/v1/info": {"get": _get("info", "Return what runs on what.", "Info", "429")},
        "/api/v1/status": {"get": _get("status", "Return the state of the service.", "Status", "429")},
        "/api/v1/predict": {"post": _predict(config)},
        "/api/v1/results": {"get": _results()},
        "/api/v1/results/{id}": {
            "get": _get("result", "Return a result.", "Result", "404", "429", parameters=[_IDENTIFIER])
        },
        "/api/v1/results/{id}/overlay": {"get": _overlay()},
        "/api/v1/events": {"get": _events()},
        "/api/v1/live/stream": {"get": _live_stream()},
        "/api/v1/bundle": {"post": _bundle()},
        "/api/v1/bundle/rollback": {
            "post": _operation(
                "rollBackBundle",
                "Swap back to the bundle before the one in use.",
                {"200": _answer("Info")},
                "409",
            )
        },
        "/api/v1/destinations/{name}/retry": {
            "post": _operation(
                "retryDestination",
                "Send again what a destination has refused and what was postponed.",
                {"200": _answer("SentAgain")},
                "404",
                "429",
                parameters=[
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                ],
            )
        },
        "/metrics": {"get": _metrics()},
        "/openapi.json": {
            "get": _operation("openapi", "Return this description.", {"200": _content("application/json", {})})
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "EchoQuad",
            "version": __version__,
            "summary": "The bedside service of EchoQuad",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": operations,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Needed on other machines alone."}
            },
        },
    }


def _predict(config: HttpConfig) -> _Json:
    types = ("image/*", "video/*", "application/dicom", "application/octet-stream")
    accepted = _answer("Accepted", "The object is on the disk and waits for its result (wait=0).")
    accepted["headers"] = {"Location": _header("Path of the result.")}
    done = _answer("Result", "The result, or its picture as PNG, if Accept prefers it.")
    done["content"]["image/png"] = _BINARY
    done["headers"] = {"Content-Location": _header("Path of the result.")}
    operation = _operation(
        "predict",
        "Decide a frame, a DICOM object or a clip: the file itself is the body.",
        {
            "200": done,
            "202": accepted,
            "422": {
                "description": "No frame could be decided: the result has no rows.",
                "content": {
                    "application/json": {"schema": {"anyOf": [_reference("Result"), _reference("Error")]}},
                },
            },
        },
        "415",
        "429",
        "503",
        "504",
        parameters=[
            {
                "name": "name",
                "in": "query",
                "description": "Name of the object in rows and on the page; by default a random one.",
                "schema": {"type": "string"},
            },
            {
                "name": "wait",
                "in": "query",
                "description": "0 answers once the object is on the disk, and does not wait for its result.",
                "schema": {"type": "string", "enum": ["0", "1"], "default": "1"},
            },
            _CAM,
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Identifies a repeated request, which gets the result of the first.",
                "schema": {"type": "string", "pattern": "^[ -~]{0,200}$"},
            },
        ],
    )
    operation["requestBody"] = {
        "required": True,
        "description": f"At most {config.max_body_mb} MiB.",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary", "minLength": 1}} for media_type in types
        },
    }
    return operation


def _results() -> _Json:
    return _get(
        "results",
        "Return the latest results, latest first; with after, those after a number, in order.",
        "Results",
        "429",
        parameters=[
            _integer("limit", "Results in the answer, at most.", 1, MAX_LIMIT, 100),
            _integer("before", "Only results with a smaller number.", 1),
            _integer("after", "Only results with a larger number; the first ones come first.", 0),
        ],
    )


def _overlay() -> _Json:
    row = _integer("row", "Position of the row in the result.", 0, default=0)
    return _operation(
        "overlay",
        "Return the picture of a row with its four decisions.",
        {"200": _content("image/png", _BINARY["schema"])},
        "404",
        "422",
        "429",
        parameters=[_IDENTIFIER, row, _CAM],
    )


def _events() -> _Json:
    answer = _content("text/event-stream", {"type": "string"})
    answer["description"] = (
        "Events: result (id: its number, data: a Result), status (data: a Status) and live (data: row, captured, "
        "age_ms, dropped, and state: ok, frozen, no signal or stopped). A comment comes at least every 10 s."
    )
    return _operation(
        "events",
        "Return results, status and live decisions as server-sent events.",
        {"200": answer},
        "503",
        parameters=[
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "Number of the last result that the client got; the stream goes on after it.",
                "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
            }
        ],
    )


def _live_stream() -> _Json:
    return _operation(
        "liveStream",
        "Return the live source as JPEG pictures, one after another.",
        {"200": _content("multipart/x-mixed-replace", _BINARY["schema"])},
        "404",
        "503",
    )


def _bundle() -> _Json:
    operation = _operation(
        "loadBundle",
        "Verify, test and warm up a bundle beside the one in use, then swap.",
        {"200": _answer("Info")},
        "404",
        "409",
        "415",
        "422",
    )
    schema = {"schema": _reference("BundleChoice")}
    operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation


def _ready() -> _Json:
    operation = _get("isReady", "Return whether objects are decided.", "Ready", "429")
    operation["responses"]["503"] = _answer("Ready", "They are not; the reasons are given.")
    operation["responses"]["503"]["headers"] = {"Retry-After": _header("Seconds.")}
    return operation


def _metrics() -> _Json:
    answer = _content("text/plain", {"type": "string"})
    return _operation("metrics", "Return all metrics in the text format of Prometheus.", {"200": answer}, "429")


def _get(name: str, summary: str, schema: str, *errors: str, parameters: list[_Json] | None = None) -> _Json:
    return _operation(name, summary, {"200": _answer(schema)}, *errors, parameters=parameters)


def _operation(name: str, summary: str, answers: _Json, *errors: str, parameters: list[_Json] | None = None) -> _Json:
    refused = {status: _refusal(status) for status in sorted({*_EVERYWHERE, *errors}) if status not in answers}
    operation: _Json = {"operationId": name, "summary": summary, "responses": {**answers, **refused}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _refusal(status: str) -> _Json:
    answer = _answer("Error", _ERRORS[status])
    if status in _RETRY:
        answer["headers"] = {"Retry-After": _header("Seconds after which another attempt makes sense.")}
    return answer


def _answer(schema: str, description: str = "The answer.") -> _Json:
    return {**_content("application/json", _reference(schema)), "description": description}


def _content(media_type: str, schema: _Json) -> _Json:
    return {"description": "The answer.", "content": {media_type: {"schema": schema}}}


def _header(description: str) -> _Json:
    return {"description": description, "schema": {"type": "string"}}


def _integer(name: str, description: str, low: int, high: int = MAX_INTEGER, default: int | None = None) -> _Json:
    schema: _Json = {"type": "integer", "minimum": low, "maximum": high}
    if default is not None:
        schema["default"] = default
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _reference(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}
