"""Pickled and copied predictors: the copy opens the bundle again, or pickling is refused plainly."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from echoquad_runtime.errors import BundleError, ConfigError
from echoquad_runtime.predict.predictor import Predictor

FRAME = (np.add.outer(np.arange(50), np.arange(71)) * 2).astype(np.uint8)


def test_pickled_predictor_opens_the_bundle_again(tiny_bundle: Path) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=1, method="average", abstain_below=0.9, batch_size=3)
    for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor), copy.copy(predictor)):
        assert other(FRAME) == predictor(FRAME)
        assert (other.method, other.abstain_below, other.batch_size, other.threads) == ("average", 0.9, 3, 1)
        assert other.engine is not predictor.engine


def test_predictor_works_in_a_spawned_process(tiny_bundle: Path) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(predictor, (FRAME,)) == predictor(FRAME)


def test_predictor_of_an_engine_says_that_it_cannot_be_pickled(tiny_bundle: Path) -> None:
    predictor = Predictor(Predictor(tiny_bundle, device="cpu", threads=1).engine)
    for call in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match="a predictor of an engine cannot be pickled"):
            call(predictor)


def test_bundle_replaced_after_pickling_is_refused(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Predictor("bundle", device="cpu", threads=1))
    monkeypatch.chdir("/")
    pickle.loads(data)  # a relative path is resolved
    shutil.rmtree(folder)
    make_tiny_bundle(folder, classes=("A", "B", "C"))
    with pytest.raises(BundleError, match="was replaced"):
        pickle.loads(data)
