"""JSON of results and answers."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["encode_json"]


def encode_json(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8.

    Raises
    ------
    ValueError
        If a number is not finite: JSON has none, and a browser would refuse the whole answer.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # a lone surrogate in a file name must not cost the answer
