"""JSON schemas of the API's values."""

from __future__ import annotations

from typing import Any, Final

from echoquad_serve.http.routes.parameters import MAX_INTEGER

__all__ = ["SCHEMAS"]

_STRING: Final = {"type": "string"}
_NUMBER: Final = {"type": "number"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_UNIX_TIME: Final = {"type": "number", "description": "Unix time in seconds."}
_ID: Final = {"type": "string", "pattern": "^[0-9a-f]{32}$", "description": "32 hexadecimal digits."}
_OPEN_OBJECT: Final = {"type": "object", "additionalProperties": True}


def _object(properties: dict[str, Any], description: str, *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "description": description, "required": required, "properties": properties}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_ROW: Final = _object(
    {
        "file": {"type": "string", "description": "Name of the frame; of a clip with #NUMBER."},
        "method": {"type": "string", "description": "Vote rule."},
        "pred_image": {"type": "string", "description": "Class of the frame, or INDETERMINATE."},
        "flags": _array(_STRING),
        "device": _STRING,
        "precision": _STRING,
        "typicality": _nullable(_NUMBER),
        "confidence": _NUMBER,
        "bundle_sha256": _STRING,
        "provider": _STRING,
        "abstained_because": _STRING,
        "smoothed_over": {"type": "integer", "minimum": 1},
    },
    "The decision on a frame: the JSON lines of `echoquad predict` and what ran. For each class C there are prob_C, "
    "and for each quadrant Q of LA, RA, LV, RV pred_Q and p_Q_C.",
    optional=("confidence", "bundle_sha256", "provider", "abstained_because", "smoothed_over"),
)
_ROW["additionalProperties"] = True

_RESULT: Final = _object(
    {
        "id": _ID,
        "number": {"type": "integer", "minimum": 1, "description": "Position in the order of all results."},
        "status": {
            "enum": ["done", "failed", "expired"],
            "description": "With at least one row; with failures alone; not decided since its deadline had passed.",
        },
        "origin": {"enum": ["http", "folder", "dicom", "live"]},
        "name": _STRING,
        "received": _UNIX_TIME,
        "finished": _UNIX_TIME,
        "rows": _array(_reference("Row")),
        "failures": _array(_reference("Failure")),
        "bundle": {
            "type": "object",
            "additionalProperties": _STRING,
            "description": "name, sha256 and contract_hash of the bundle that decided; empty if none did.",
        },
        "timings_ms": {"type": "object", "additionalProperties": _NUMBER},
    },
    "The result of an object.",
)

_STATUS: Final = _object(
    {
        "intake": {
            **_object(
                {"http": _nullable(_OPEN_OBJECT), "folder": _nullable(_OPEN_OBJECT), "dicom": _nullable(_OPEN_OBJECT)},
                "State of each way in; null if it is not configured.",
            )
        },
        "queue": {
            **_object(
                {
                    "waiting": _COUNT,
                    "oldest_waiting_s": _nullable({"type": "number", "minimum": 0}),
                    "in_progress": _COUNT,
                    "results": _COUNT,
                    "free_mb": {"type": "number"},
                    "full": {"type": "boolean"},
                    "destinations": _OPEN_OBJECT,
                },
                "The queue on the disk.",
            ),
            "additionalProperties": True,
        },
        "destinations": _array(
            _object(
                {
                    "name": _STRING,
                    "type": {"enum": ["folder", "webhook", "dicom"]},
                    "waiting": _COUNT,
                    "refused": _COUNT,
                    "last_error": _nullable(_STRING),
                    "note": {
                        "type": "string",
                        "description": "What the latest report lacked, and why.",
                    },
                    "ok": {"type": "boolean"},
                },
                "A destination of results.",
            )
        ),
        "bundle": {
            **_object(
                {
                    "name": _STRING,
                    "sha256": _STRING,
                    "device": _STRING,
                    "provider": _STRING,
                    "precision": _STRING,
                    "self_test": {},
                },
                "The bundle in use, and what it runs on.",
            ),
            "additionalProperties": True,
        },
        "live": _nullable(_OPEN_OBJECT),
        "ready": {"type": "boolean"},
        "reasons": _array(_STRING),
    },
    "State of the service.",
)

SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "code": {"type": "string", "pattern": "^E_[A-Z0-9_]+$", "description": "Stable name."},
                    "message": {"type": "string", "description": "What is wrong, and how to fix it."},
                },
                "An error.",
            )
        },
        "Why a request was refused.",
    ),
    "Row": _ROW,
    "Failure": _object({"file": _STRING, "code": _STRING, "message": _STRING}, "A frame that could not be decided."),
    "Result": _RESULT,
    "Results": _object(
        {
            "results": _array(_reference("Result")),
            "next": {
                **_nullable({"type": "integer", "minimum": 1, "maximum": MAX_INTEGER}),
                "description": "The value of `before` (or of `after`, if that was given) for the next page.",
            },
        },
        "A page of results.",
    ),
    "Accepted": _object({"id": _ID}, "An object that waits for its result."),
    "Live": _object({"live": {"const": True}}, "The process serves requests."),
    "Ready": _object({"ready": {"type": "boolean"}, "reasons": _array(_STRING)}, "Whether objects are decided."),
    "Info": {
        **_object({"bundle": _OPEN_OBJECT}, "The bundle, its contract, the device, provider and precision that run."),
        "additionalProperties": True,
    },
    "Status": _STATUS,
    "SentAgain": _object({"sent_again": _COUNT}, "How many results are sent again."),
    "BundleChoice": {
        **_object(
            {"folder": {"type": "string", "description": "Name of a folder in the configured bundle folder."}},
            "The bundle to load.",
        ),
        "additionalProperties": False,
    },
}
"""Schemas by name."""
