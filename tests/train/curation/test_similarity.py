"""Near duplicates: copies of a frame are found, other frames are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from echoquad_train.curation.similarity import (
    CENTRED,
    MIN_SIMILARITY,
    SHIFTED,
    near_duplicates,
    perceptual_hashes,
    similarity,
    thumbnail,
)
from echoquad_train.phantom.drawing import draw_patient, generator_of, render


def phantom(patient: int, frame: int = 0) -> np.ndarray:
    rng = generator_of(0, 2, 0, patient, frame)
    return render(draw_patient(generator_of(0, 1, 0, patient), "ASD"), rng, float(rng.random()))


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [phantom(patient) for patient in range(6)]


def pairs(frames, others, views=SHIFTED):
    thumbs = [thumbnail(frame) for frame in (*frames, *others)]
    bits = [perceptual_hashes(thumb, views) for thumb in thumbs]
    return near_duplicates(bits, thumbs.__getitem__, views, lambda a, b: np.ones(len(a), bool), 1000)


def encoded(frame: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("L"))


def resized(frame: np.ndarray, factor: float) -> np.ndarray:
    size = (int(frame.shape[1] * factor), int(frame.shape[0] * factor))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def cut(frame: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    height, width = frame.shape
    return frame[int(top * height) : int((1 - bottom) * height), int(left * width) : int((1 - right) * width)]


COPIES = {
    "encoded": lambda frame: encoded(frame, 40),
    "brightened": lambda frame: np.clip(frame * 1.2 + 15, 0, 255).astype(np.uint8),
    "darkened": lambda frame: (255 * (frame / 255) ** 1.4).astype(np.uint8),
    "halved": lambda frame: resized(frame, 0.5),
    "enlarged": lambda frame: resized(frame, 1.6),
    "cut on all sides": lambda frame: cut(frame, 0.03, 0.03, 0.03, 0.03),
    "cut at a corner": lambda frame: cut(frame, 0.06, 0.05, 0, 0),
    "all at once": lambda frame: encoded(
        np.clip(cut(frame, 0.02, 0.01, 0, 0.02) * 1.1 + 5, 0, 255).astype("uint8"), 70
    ),
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_the_only_near_duplicate(frames, how: str) -> None:
    found, left = pairs(frames, [COPIES[how](frames[3])])
    assert [(pair.first, pair.second) for pair in found] == [(3, len(frames))]
    assert found[0].similarity >= MIN_SIMILARITY and left == 0


def test_two_copies_of_a_frame_form_one_tree(frames) -> None:
    others = [COPIES["encoded"](frames[0]), COPIES["halved"](frames[0])]
    found, _ = pairs(frames, others)
    assert len(found) == 2  # three frames, two pairs
    joined = {index for pair in found for index in (pair.first, pair.second)}
    assert joined == {0, len(frames), len(frames) + 1}


def test_candidates_beyond_the_limit_are_counted_as_unchecked(frames) -> None:
    found, left = near_duplicates(
        [perceptual_hashes(thumbnail(frame), CENTRED) for frame in (frames[0], frames[0], frames[0])],
        lambda index: thumbnail(frames[0]),
        CENTRED,
        lambda a, b: np.ones(len(a), bool),
        1,
    )
    assert (len(found), left) == (1, 2)


def test_only_selected_pairs_are_compared(frames) -> None:
    thumbs = [thumbnail(frame) for frame in (frames[0], frames[0], frames[1])]
    bits = [perceptual_hashes(thumb, CENTRED) for thumb in thumbs]
    assert near_duplicates(bits, thumbs.__getitem__, CENTRED, lambda a, b: np.zeros(len(a), bool), 10) == ([], 0)
    assert near_duplicates([], thumbs.__getitem__, CENTRED, lambda a, b: np.ones(len(a), bool), 10) == ([], 0)


@settings(max_examples=20)
@given(st.integers(0, 255), st.integers(2, 40), st.integers(2, 40))
def test_uniform_frame_is_similar_to_nothing(level: int, width: int, height: int) -> None:
    flat = thumbnail(np.full((height, width), level, np.uint8))
    assert similarity(flat, flat) == 0.0
    assert similarity(flat, thumbnail(phantom(0))) == 0.0


def test_frame_is_similar_to_itself_only(frames) -> None:
    thumb = thumbnail(frames[0])
    assert similarity(thumb, thumb) == pytest.approx(1.0, abs=1e-5)
    assert similarity(thumb, thumbnail(frames[4])) < 0.8
