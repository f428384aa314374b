"""Inference on the frames or quadrants of a request, by the path that decides the frames of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame, GreyFrame
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import cut_frame
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.worker_pool import FrameTask
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.kserve.infer_request import InferRequest
from echoquad_serve.http.kserve.served_model import ServedModel
from echoquad_serve.http.kserve.signature import QUADRANT_INPUT

__all__ = ["predict"]

_Levels = npt.NDArray[np.uint8]
_RGB: Final = 3


def predict(model: ServedModel, request: InferRequest) -> list[Prediction]:
    """Return the prediction of each frame.

    Raises
    ------
    ApiError
        If a frame cannot be decided: 422. A request has an answer for all of its frames, or for none.
    BundleError
        If the engine fails.
    """
    tasks = (FrameTask(str(number), load) for number, load in enumerate(_loaders(model.contract, request), 1))
    found: list[Prediction] = []
    for result in model.predictor.predict_tasks(tasks):
        if isinstance(result, Failure):
            message = f"frame {result.file} of {len(request.levels)}: {result.error}"
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, result.error.code, message)
        found.append(result)
    return found


def _loaders(contract: Contract, request: InferRequest) -> Iterator[Callable[[_Levels], tuple[str, ...]]]:
    """Yield what writes a frame's quadrants, uint8 [4, 1, S, S], and returns its flags."""
    for levels in request.levels:
        if request.input == QUADRANT_INPUT:
            yield partial(_copy_quadrants, levels)
        else:
            yield partial(cut_frame, _decoded(levels), contract)


def _decoded(levels: _Levels) -> DecodedFrame:
    if levels.ndim == _RGB and levels.shape[2] == _RGB:
        return ColourFrame(levels)
    return GreyFrame(levels.reshape(levels.shape[:2]))


def _copy_quadrants(levels: _Levels, out: _Levels) -> tuple[str, ...]:
    out[...] = levels
    return quality_flags(out)
