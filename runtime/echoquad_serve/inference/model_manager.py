"""The bundle in use, its replacement between two frames, and a second bundle that decides beside it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from echoquad_runtime.errors import ConfigError, EchoQuadError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.config import ModelConfig
from echoquad_serve.inference.loaded_model import LoadedModel

__all__ = ["BundleFolder", "ModelManager"]

logger = logging.getLogger(__name__)


class ModelManager:
    """Loads bundles and holds the one in use.

    A new bundle is loaded beside the one in use, which goes on deciding. It takes its place in one assignment, between
    two batches. The former one stays open, so that a roll-back is immediate.

    Parameters
    ----------
    folder
        The bundle to begin with; `start` loads it.
    config
        How bundles run.
    on_event
        Called with ``bundle_loaded`` or ``bundle_rolled_back``, and the model in use from then on; it is called before
        the swap, which does not happen if it raises.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, on_event: Callable[[str, LoadedModel], object] = lambda *_: None
    ) -> None:
        self._folder, self._config, self._on_event = folder, config, on_event
        self._current: LoadedModel | None = None
        self._previous: LoadedModel | None = None
        self.shadow: LoadedModel | None = None
        self._loading = threading.Lock()

    @property
    def current(self) -> LoadedModel:
        """The model in use.

        Raises
        ------
        ConfigError
            Before the first one is loaded.
        """
        if self._current is None:
            raise ConfigError("no bundle is loaded yet; wait until the service is ready")
        return self._current

    @property
    def ready(self) -> bool:
        """Whether a model is in use."""
        return self._current is not None

    def owner(self, predictor: Predictor) -> LoadedModel:
        """Return the model of a predictor that was in use a moment ago."""
        previous = self._previous
        return previous if previous is not None and previous.predictor is predictor else self.current

    def start(self) -> None:
        """Load the first bundle, and the shadow if there is one; raise as `LoadedModel`."""
        with self._loading:
            first = LoadedModel(self._folder, self._config)
            if self._config.shadow is not None:
                self.shadow = self._check_shadow(LoadedModel(self._config.shadow, self._config), first)
            self._on_event("bundle_loaded", first)
            self._current = first

    def load(self, folder: Path) -> LoadedModel:
        """Load a bundle beside the one in use, swap, and return it. If it is refused, the one in use stays.

        The bundle in use, loaded again, changes nothing.

        Raises
        ------
        BundleError, VerificationError, DeviceUnavailableError
            As `LoadedModel`.
        ConfigError
            If another bundle is being loaded, or the new one has other classes than the one in use.
        """
        if not self._loading.acquire(blocking=False):
            raise ConfigError("another bundle is being loaded; wait until it is ready, then try again")
        try:
            model = LoadedModel(folder, self._config)
            if model.sha256 == self.current.sha256:  # a swap would make the one before unreachable
                return self.current
            if model.contract.classes != (classes := self.current.contract.classes):
                raise ConfigError(
                    f"the bundle decides between {', '.join(model.contract.classes)}, the one in use between "
                    f"{', '.join(classes)}; restart the service with it"
                )
            self._on_event("bundle_loaded", model)
            self._previous, self._current = self._current, model
        finally:
            self._loading.release()
        return model

    def roll_back(self) -> LoadedModel:
        """Swap the bundle in use and the one before it, and return the one in use then.

        Raises
        ------
        ConfigError
            If there is none before it, or one is being loaded.
        """
        if not self._loading.acquire(blocking=False):
            raise ConfigError("another bundle is being loaded; wait until it is ready, then try again")
        try:
            if self._previous is None:
                raise ConfigError("there is no earlier bundle to roll back to since the service has started")
            self._on_event("bundle_rolled_back", self._previous)
            self._previous, self._current = self._current, self._previous
            return self.current
        finally:
            self._loading.release()

    @staticmethod
    def _check_shadow(shadow: LoadedModel, first: LoadedModel) -> LoadedModel:
        if shadow.contract.classes != first.contract.classes:
            raise ConfigError(
                f"the shadow bundle decides between {', '.join(shadow.contract.classes)}, expected "
                f"{', '.join(first.contract.classes)} as the first; name another --shadow"
            )
        return shadow


class BundleFolder:
    """A watched folder of bundles: one that appears complete there is loaded.

    Parameters
    ----------
    folder
        The folder. A bundle is complete once its manifest is there and reads the same twice: exports and copies are
        moved into place.
    load
        Loads a bundle and swaps to it; raises an EchoQuadError if it is refused.
    poll_s
        Seconds between two looks.
    """

    def __init__(self, folder: Path, load: Callable[[Path], object], poll_s: float = 2.0) -> None:
        self._folder, self._load, self._poll_s = folder, load, poll_s
        self._closing = threading.Event()
        self._seen: set[tuple[str, int, int]] | None = None
        self._pending: set[tuple[str, int, int]] = set()
        self._thread = threading.Thread(target=self._watch, name="echoquad-bundles", daemon=True)

    def start(self) -> None:
        """Watch the folder in a thread; bundles that are there already are not loaded."""
        self._seen = self._bundles()
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _watch(self) -> None:
        while not self._closing.wait(self._poll_s):
            try:
                self._look()
            except Exception:  # a share that is away, for example: the next look tries again
                logger.exception("the bundle folder cannot be read")

    def _look(self) -> None:
        assert self._seen is not None
        found = self._bundles() - self._seen
        for bundle in sorted(found & self._pending, key=lambda one: one[1]):
            self._seen.add(bundle)
            try:
                self._load(self._folder / bundle[0])
            except EchoQuadError as error:
                logger.error("a bundle of the bundle folder is refused: %s", error.code)
        self._pending = found

    def _bundles(self) -> set[tuple[str, int, int]]:
        """Return name, time and size of the manifest of each bundle."""
        found = set()
        for path in self._folder.glob("*/bundle.json"):
            status = path.stat()
            found.add((path.parent.name, status.st_mtime_ns, status.st_size))
        return found
