"""A loaded model: a bundle whose files and self-test are in order, with a predictor that is warm."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.reader import load_grey
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.config import ModelConfig
from echoquad_serve.inference.rows import row_of
from echoquad_serve.reports.builder import report_codes

__all__ = ["ActivationMap", "LoadedModel"]

ActivationMap = npt.NDArray[np.float32] | None
"""Activation map of a frame, as `Prediction.cam`."""

_WARM_UP_SIDE: Final = 64


class LoadedModel:
    """A bundle that is ready to decide: every file hashed, the signature checked, the self-test passed, warm.

    Parameters
    ----------
    folder
        The bundle.
    config
        How it runs.

    Raises
    ------
    BundleError, VerificationError, DeviceUnavailableError, ConfigError
        If the bundle cannot be used so.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self._config = folder, config
        self._bundle = Bundle(folder, public_key=config.public_key)
        for name in self._bundle.manifest["files"]:
            self._bundle.read(name)
        self.predictor = self._open(cam=False)
        # One frame on all threads, as a single frame runs, and two as those of a folder: each path tests itself.
        blank = np.zeros((_WARM_UP_SIDE, _WARM_UP_SIDE), np.uint8)
        self.predictor(blank)
        self.predictor.replay([blank, blank], concurrent=True)
        self.contract = self.predictor.contract
        self.sha256 = str(self._bundle.manifest["manifest_sha256"])
        self.provider = str(getattr(self.predictor.engine, "provider", ""))
        self.validation = self._bundle.validation(self.predictor.engine.precision)
        self.codes = report_codes(self._bundle)
        self._versions = host_facts() | {"echoquad": __version__}  # a millisecond, for each status
        self._cam_lock = threading.Lock()
        self._cam_predictor: Predictor | None = None

    def _open(self, *, cam: bool) -> Predictor:
        config = self._config
        return Predictor(
            self._bundle,
            device=cast("Device", config.device),
            precision=config.precision,
            threads=config.threads,
            spinning=False,
            method=cast("Any", config.vote),
            abstain_below=config.abstain_below,
            abstain_unlike=config.abstain_unlike,
            cam=cam,
            warm_up=not cam,
        )

    def identity(self) -> dict[str, str]:
        """Return ``name``, ``sha256`` and ``contract_hash`` of the bundle."""
        return {"name": self.folder.name, "sha256": self.sha256, "contract_hash": self.contract.sha256}

    def info(self) -> dict[str, Any]:
        """Return the identity of the bundle, its contract, and what really runs."""
        engine = self.predictor.engine
        return {
            "bundle": self.identity() | {"signed_by": self._bundle.signed_by or ""},
            "contract": self.contract.to_dict(),
            "device": engine.device,
            "provider": self.provider,
            "precision": engine.precision,
            "threads": self.predictor.threads,
            "self_test": self.predictor.self_test,
            "versions": self._versions,
        }

    def row(self, prediction: Prediction) -> dict[str, Any]:
        """Return the row of a prediction of this model."""
        return row_of(
            prediction,
            self.contract,
            bundle_sha256=self.sha256,
            provider=self.provider,
            abstain_unlike=self.predictor.abstain_unlike,
        )

    def activation_map(self, file: FrameFile) -> ActivationMap:
        """Return the activation map of a frame, computed again: no result stores it.

        Raises
        ------
        FrameError
            If the frame cannot be read again.
        BundleError
            If the bundle computes no activation maps.
        """
        with self._cam_lock:
            self._cam_predictor = self._cam_predictor or self._open(cam=True)
        return self._cam_predictor(load_grey(file)).cam
