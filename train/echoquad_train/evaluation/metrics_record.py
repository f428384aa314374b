"""Base class of the metrics dataclasses, with their conversion to the JSON values of ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

__all__ = ["MetricsRecord"]


class MetricsRecord:
    """Base of the metrics dataclasses; a subclass overrides `to_dict` where its JSON differs from its fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: records become dicts, and tuples lists, at every depth."""
        return {field.name: _json_value(getattr(self, field.name)) for field in fields(self)}


def _json_value(value: Any) -> Any:
    match value:
        case MetricsRecord():
            return value.to_dict()
        case Mapping():
            return {key: _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case _:
            return value
