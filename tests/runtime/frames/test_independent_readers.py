"""Clips and pictures equal those of the ffmpeg command and of ImageMagick; a test is skipped without its program.

`ECHOQUAD_IMAGE_SUITE` may name a folder of public test images, such as ``Tests/images`` of Pillow's source distribution
(``pip download --no-deps --no-binary pillow pillow==11.3.0``): all that EchoQuad accepts are compared too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.images.image import decode_grey
from echoquad_runtime.quadrants import Grey

pytestmark = pytest.mark.slow

FFMPEG = shutil.which("ffmpeg")
MAGICK = next((path for name in ("magick", "convert") if (path := shutil.which(name))), None)
LUMA = np.array([0.299, 0.587, 0.114])

needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg command")
needs_magick = pytest.mark.skipif(MAGICK is None, reason="needs ImageMagick")


def run(program: str | None, *arguments: str | Path) -> bytes:
    assert program is not None
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(done.stderr.decode(errors="replace")[-200:])
    return done.stdout


# ---------------------------------------------------------------------------------------------- clips

CLIPS = {
    "h264.mp4": "-c:v libx264",
    "h264.mkv": "-c:v libx264 -bf 3",
    "h264 with B-frames.avi": "-c:v libx264 -bf 3",
    "h264 in fragments.mp4": "-c:v libx264 -movflags frag_keyframe+empty_moov",
    "h264 interlaced.mp4": "-c:v libx264 -flags +ildct+ilme -x264opts tff=1",
    "h264 of 10 bits.mp4": "-c:v libx264 -pix_fmt yuv420p10le",
    "hevc.mp4": "-c:v libx265 -x265-params log-level=none",
    "hevc of 12 bits.mp4": "-c:v libx265 -pix_fmt yuv420p12le -x265-params log-level=none",
    "hevc with open groups.mkv": "-c:v libx265 -x265-params log-level=none:keyint=10:open-gop=1",
    "vp8.webm": "-c:v libvpx -auto-alt-ref 1 -lag-in-frames 16",
    "vp9.webm": "-c:v libvpx-vp9 -auto-alt-ref 1 -lag-in-frames 16",
    "mpeg4.mp4": "-c:v mpeg4 -bf 2",
    "mpeg4.avi": "-c:v mpeg4 -bf 2",
    "xvid packed.avi": "-c:v libxvid -bf 2",
    "mpeg2.mkv": "-c:v mpeg2video -bf 2",
    "mjpeg.avi": "-c:v mjpeg",
    "mjpeg.mov": "-c:v mjpeg",
    "huffyuv.avi": "-c:v huffyuv",
    "prores.mov": "-c:v prores",
    "ffv1 of 10 bits grey.mkv": "-c:v ffv1 -pix_fmt gray10le",
    "ffv1 of 16 bits grey.mkv": "-c:v ffv1 -pix_fmt gray16le",
    "ffv1 of 10 bits rgb.mkv": "-c:v ffv1 -pix_fmt gbrp10le",
    "raw.avi": "-c:v rawvideo -pix_fmt bgr24",
    "repeated frames.avi": "-vf select='mod(n\\,3)' -vsync vfr -enc_time_base 1/25 -c:v mpeg4",
}


def compare_clip(path: Path) -> None:
    pytest.importorskip("av")
    from echoquad_runtime.frames.clips.video import VideoFile

    clip = VideoFile(lambda: path.open("rb"))
    greys = [clip.decode(number, "none").grey() for number in range(1, clip.frame_count + 1)]
    assert clip.stated_frame_count == clip.frame_count
    options = ("-map", "0:v:0", "-vsync", "passthrough", "-pix_fmt", "gray", "-f", "rawvideo", "-")
    expected = np.frombuffer(run(FFMPEG, "-v", "error", "-i", path, *options), np.uint8)
    expected = expected.reshape(-1, *greys[0].shape)
    assert len(greys) == len(expected)
    for grey, other in zip(greys, expected, strict=True):
        assert np.abs(grey.astype(int) - other).max() <= 3


@needs_ffmpeg
@pytest.mark.parametrize("name", CLIPS)
def test_clips_equal_those_of_ffmpeg(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    source = ("-v", "error", "-f", "lavfi", "-i", "testsrc=size=160x120:rate=25:duration=2")
    run(FFMPEG, *source, *CLIPS[name].replace("'", "").split(), path)
    compare_clip(path)
    if path.suffix in (".mp4", ".mkv"):  # cut without decoding: an edit list hides what is before
        trimmed = tmp_path / f"trimmed{path.suffix}"
        run(FFMPEG, "-v", "error", "-ss", "0.55", "-i", path, "-c", "copy", trimmed)
        compare_clip(trimmed)


# ---------------------------------------------------------------------------------------------- pictures


def read_by_magick(path: Path) -> np.ndarray:
    """Return a picture over black, float [H * W, 3]."""
    options = ("-auto-orient", "-background", "black", "-alpha", "remove", "-alpha", "off", "-colorspace", "sRGB")
    return np.frombuffer(run(MAGICK, f"{path}[0]", *options, "-depth", "8", "rgb:-"), np.uint8).reshape(-1, 3)


def read_by_ffmpeg(path: Path) -> np.ndarray:
    """Return a picture over black, float [H * W, 3]."""
    options = ("-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgba", "-")
    pixels = np.frombuffer(run(FFMPEG, "-v", "error", "-i", path, *options), np.uint8).reshape(-1, 4).astype(float)
    return pixels[:, :3] * pixels[:, 3:] / 255


def difference(grey: Grey, pixels: np.ndarray) -> float:
    """Return the mean difference of grey levels; infinity for other sizes."""
    return float(np.abs(pixels @ LUMA - grey.ravel()).mean()) if len(pixels) == grey.size else float("inf")


PICTURES = {
    f"{colours} {depth} {compression} {planes} {endian}.tif": [
        *("-colorspace", colours, "-depth", depth, "-compress", compression),
        *("-interlace", planes, "-define", f"tiff:endian={endian}"),
    ]
    for colours in ("gray", "sRGB", "CMYK")
    for depth in ("8", "12", "16")
    for compression in ("None", "LZW", "Zip")
    for planes in ("none", "plane")
    for endian in ("lsb", "msb")
} | {
    "white is zero.tif": ["-colorspace", "gray", "-depth", "16", "-define", "quantum:polarity=min-is-white"],
    "565.bmp": ["-define", "bmp:subtype=RGB565"],
    "555.bmp": ["-define", "bmp:subtype=RGB555"],
    "transparent colour.png": ["-transparent", "rgb(0,255,0)", "-define", "png:color-type=2"],
    "16 bits.png": ["-depth", "16"],
}


@needs_magick
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_equal_those_of_imagemagick(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    run(MAGICK, "-size", "48x36", "gradient:rgb(0,255,0)-rgb(200,40,90)", "-swirl", "60", *PICTURES[name], path)
    assert difference(decode_grey(path.read_bytes()), read_by_magick(path)) < 1


# Read as other programs read them that follow the specification, and otherwise than the two programs do.
KNOWN = frozenset(
    {
        "16_bit_binary_pgm.tiff",  # 32-bit integers are read as 16-bit grey
        "1_trns.png",  # the lowest bit of the transparent colour counts
        "app13.jpg",  # 4 x 4 pixels, of subsampled chroma
        "badplanes.bmp",
        "badrle.bmp",
        "hopper2IR.tif",  # white is 0, and the bits of a byte are reversed
        "hopper4IR.tif",
        "mmap_error.bmp",
        "pal8_offset.bmp",
        "rgb16-231.bmp",
        "rgb32bf-abgr.bmp",
        "rgb32fakealpha.bmp",  # the fourth byte is reserved
        "rgba16-4444.bmp",
        "rgba32abf.bmp",
        "tiff_tiled_cmyk_jpeg.tif",
        "xmp_tags_orientation.png",  # the orientation is applied
        "xmp_tags_orientation_exiftool.png",
    }
)


@needs_ffmpeg
@needs_magick
def test_pictures_of_a_public_suite_equal_those_of_other_programs() -> None:
    folder = os.environ.get("ECHOQUAD_IMAGE_SUITE")
    if not folder:
        pytest.skip("ECHOQUAD_IMAGE_SUITE names no folder")
    accepted, other = 0, []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix not in (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff") or path.name in KNOWN:
            continue
        try:
            grey = decode_grey(path.read_bytes())
        except FrameError:
            continue
        accepted += 1
        found = []
        for read in (read_by_magick, read_by_ffmpeg):
            try:
                found.append(difference(grey, read(path)))
            except (ValueError, pytest.skip.Exception, subprocess.TimeoutExpired):
                continue
        if min(found, default=float("inf")) > 1.6:
            other.append((str(path.relative_to(folder)), found))
    assert accepted > 50
    assert other == []
