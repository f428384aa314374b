"""Names of file formats that EchoQuad does not read, from their first bytes, for error messages."""

from __future__ import annotations

import re
from typing import Final

from echoquad_runtime.frames.formats import picture_or_sound_brand

__all__ = ["SOUND", "unsupported_format"]

SOUND: Final = "a sound file"

_SIGNATURES: Final = (
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"RIFF.{4}WAVE|fLaC|OggS|ID3|MThd|FORM.{4}AIF", SOUND),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "JPEG XL"),
    (rb"8BPS", "Photoshop"),
    (rb"%PDF", "PDF"),
    (rb"P[1-7][\s#]", "a Netpbm image"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb"#\?RADIANCE", "Radiance HDR"),
    (rb"\x00\x00\x01\x00", "an icon"),
    (rb"DDS ", "DDS"),
    (rb"qoif", "QOI"),
    (rb"\x01\xda[\x00\x01][\x01\x02]", "SGI"),
    (rb"IIII|IIRO|IIU\x00", "a camera's raw file"),
    (rb"FLV\x01", "Flash video"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media"),
    (rb"\x00\x00\x01[\xb3\xba]|\x47.{187}\x47", "MPEG-1 or MPEG-2 video"),
    (rb"\x89HDF", "HDF5"),
    (rb"CDF[\x01\x02]", "NetCDF"),
    (rb"NRRD", "NRRD"),
    (rb".{344}n[+i]1\x00", "NIfTI"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf", "an archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ", "a compressed file"),
)


def unsupported_format(data: bytes) -> str | None:
    """Return the name of the format of a file that is not read, with its article if it needs one; None if unknown.

    Parameters
    ----------
    data
        The first 400 bytes of the file, or more.
    """
    brand = picture_or_sound_brand(data)
    if brand:
        return brand
    return next((name for pattern, name in _SIGNATURES if re.match(pattern, data, re.DOTALL)), None)
