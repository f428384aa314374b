"""How a live source is named: ``v4l2:/dev/video0``, ``rtsp://...``, ``lavfi:GRAPH``, or a file.

``v4l2:`` is followed by a device of Video4Linux, and optionally by what the grabber shall deliver:
``v4l2:/dev/video0?video_size=1280x720&framerate=30``. ``lavfi:`` is followed by a graph of FFmpeg's filters, such as
``testsrc=size=800x600:rate=30``. A file is a clip of AVI, MP4 or Matroska. A file and a graph play at their own rate,
and begin again at their end: they stand in for a camera, which has no end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qsl, urlsplit

from echoquad_runtime.errors import ConfigError

__all__ = ["SourceKind", "SourceSpec", "parse_source"]

SourceKind = Literal["v4l2", "rtsp", "lavfi", "file"]

_DEVICE_OPTIONS: Final = ("channel", "framerate", "input_format", "standard", "video_size")
_NETWORK_SCHEMES: Final = ("rtsp", "rtsps")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A live source.

    Attributes
    ----------
    kind
        What kind of source it is.
    address
        The device, the URL, the graph or the file.
    options
        Options of FFmpeg for a device.
    """

    kind: SourceKind
    address: str = field(repr=False)  # a URL may hold a password
    options: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The source for people and logs: without a password, and without the name of a file."""
        if self.kind == "rtsp":
            parts = urlsplit(self.address)
            host = parts.hostname or ""
            return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}"
        if self.kind == "lavfi":  # a graph may name files; its first filter is enough
            return f"lavfi:{re.split('[^A-Za-z0-9_]', self.address, maxsplit=1)[0]}"
        return "file" if self.kind == "file" else f"{self.kind}:{self.address}"


def parse_source(spec: str) -> SourceSpec:
    """Parse the name of a live source.

    Raises
    ------
    ConfigError
        If it names no source.
    """
    prefix, colon, rest = spec.partition(":")
    if colon and prefix == "v4l2":
        address, _, query = rest.partition("?")
        options = dict(parse_qsl(query))
        if unknown := next((name for name in options if name not in _DEVICE_OPTIONS), None):
            raise ConfigError(f"live source: unknown option {unknown!r}; expected one of {', '.join(_DEVICE_OPTIONS)}")
        return SourceSpec("v4l2", _given(address, "a device, as in v4l2:/dev/video0"), options)
    if colon and prefix == "lavfi":
        return SourceSpec("lavfi", _given(rest, "a graph of filters, as in lavfi:testsrc"))
    if colon and prefix in _NETWORK_SCHEMES:
        try:
            known = bool((parts := urlsplit(spec)).hostname) and (parts.port or 1) > 0
        except ValueError:
            known = False
        if not known:
            raise ConfigError("live source: the address names no host; expected rtsp://HOST[:PORT]/PATH")
        return SourceSpec("rtsp", spec)
    if colon and rest.startswith("//"):
        raise ConfigError(
            f"live source: {prefix}:// is not supported; expected v4l2:DEVICE, rtsp://..., lavfi:GRAPH, or a file"
        )
    # Absolute, since the process that opens it must not depend on the folder that the service works in.
    return SourceSpec("file", str(Path(_given(spec, "v4l2:DEVICE, rtsp://..., lavfi:GRAPH, or a file")).absolute()))


def _given(value: str, expected: str) -> str:
    if not value or "\0" in value:
        raise ConfigError(f"live source: the name is incomplete; expected {expected}")
    return value
