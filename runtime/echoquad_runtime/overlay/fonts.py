"""The font of overlays and plots."""

from __future__ import annotations

from PIL import ImageFont

__all__ = ["load_font"]


def load_font(size: float) -> ImageFont.ImageFont:
    """Return Pillow's built-in font at a size in pixels."""
    return ImageFont.load_default(size)  # type: ignore[return-value]  # Pillow's own union of its two font classes
