"""One-line summaries of the exceptions of onnxruntime and other libraries."""

from __future__ import annotations

import re

__all__ = ["summarize_error"]


def summarize_error(error: object) -> str:
    """Return an exception's message as one line of at most 240 characters, without onnxruntime's preamble."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) :", r"\1:", text)
    # A failed CUDA call reports a C++ signature first and the host name last. OpenVINO reports two signatures, then
    # every source file that the exception passed through.
    text = re.sub(r"^.*?(\w+ failure -?\d+: .*?) ; GPU=.*$", r"\1", text)
    text = re.sub(r"^.*\[OpenVINO-EP\] ", "OpenVINO: ", text)
    text = re.sub(r"Exception from \S+:\d+: ", "", text).rstrip(".")
    return text if len(text) <= 240 else text[:237] + "..."
