"""Rows of results: why a model abstains, in the words that the metric has as labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.contract import INDETERMINATE
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.inference.rows import prediction_of, row_of
from echoquad_serve.monitoring.metrics import ServiceMetrics
from echoquad_serve.records import ABSTENTIONS, LOW_CONFIDENCE, UNLIKE_TRAINING_FRAMES


def predictions(folder: Path, predictor: Predictor) -> list[Prediction]:
    return [found for found in predictor.predict(str(folder)) if isinstance(found, Prediction)]


def test_metric_counts_real_abstentions_by_their_reason(tiny_bundle: Path, frames_folder: Path) -> None:
    unsure = Predictor(tiny_bundle, device="cpu", abstain_below=1.0)
    metrics, counted = ServiceMetrics(), dict.fromkeys(ABSTENTIONS, 0)
    for index, prediction in enumerate(predictions(frames_folder, unsure)):
        if index % 2:
            object.__setattr__(prediction, "flags", (*prediction.flags, UNLIKE_TRAINING))
        row = row_of(prediction, unsure.contract, bundle_sha256="ab", provider="CPU", abstain_unlike=True)
        assert row["pred_image"] == INDETERMINATE
        assert row["abstained_because"] == (UNLIKE_TRAINING_FRAMES if index % 2 else LOW_CONFIDENCE)
        counted[row["abstained_because"]] += 1
        metrics.observe_rows([row])
    text = metrics.render().decode()
    for reason, count in counted.items():
        assert f'echoquad_abstentions_total{{reason="{reason}"}} {count:.1f}' in text
    assert min(counted.values()) > 0 and 'echoquad_abstentions_total{reason="other"}' not in text


def test_flag_alone_is_no_reason_to_abstain(tiny_bundle: Path, frames_folder: Path) -> None:
    unsure = Predictor(tiny_bundle, device="cpu", abstain_below=1.0)
    prediction = predictions(frames_folder, unsure)[0]
    object.__setattr__(prediction, "flags", (UNLIKE_TRAINING,))
    row = row_of(prediction, unsure.contract, bundle_sha256="ab", provider="CPU", abstain_unlike=False)
    assert row["abstained_because"] == LOW_CONFIDENCE


@pytest.mark.parametrize("below", [None, 1.0])
def test_row_states_the_prediction(tiny_bundle: Path, frames_folder: Path, below: float | None) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", abstain_below=below)
    for prediction in predictions(frames_folder, predictor):
        row = row_of(prediction, predictor.contract, bundle_sha256="ab", provider="CPU", abstain_unlike=False)
        assert prediction_of(row, predictor.contract) == prediction
        assert ("abstained_because" in row) == (below is not None)
