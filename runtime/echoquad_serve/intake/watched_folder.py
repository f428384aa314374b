"""A watched folder: files that other programs put there are accepted, each once.

The folder is listed again and again. Notifications of the system do not report what other machines write to a network
share.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

from echoquad_runtime.frames.formats import HEAD_BYTES, is_dicom
from echoquad_runtime.storage.atomic import make_folder
from echoquad_runtime.storage.regular_file import write_all
from echoquad_runtime.storage.row_names import encode_text
from echoquad_serve.config import FolderIntakeConfig
from echoquad_serve.errors import IntakeError
from echoquad_serve.intake.accepted_keys import AcceptedKeys
from echoquad_serve.intake.folder_scan import CallMonitor, FolderScan, SeenFile
from echoquad_serve.records import IncomingObject, Job

__all__ = ["ACCEPTED_FOLDER", "WatchedFolder"]

_LOGGER: Final = logging.getLogger("echoquad_serve.intake")

ACCEPTED_FOLDER: Final = "accepted"
"""Name of the subfolder that accepted files move to."""

_COPY_BYTES: Final = 1 << 20
_BLOCKED_S: Final = 1.0  # with a poll a second, status says so two seconds after the share has stopped to answer
_SLOWEST_POLL_S: Final = 2.0
_IDLE_SHARE: Final = 100  # a large folder is listed less often: it takes 1/100 of the time
_LONGEST_PAUSE_S: Final = 60.0
_SETTLE_S: Final = 10.0
_CLOSE_S: Final = 1.8
_MOST_NAMES: Final = 10_000
_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


class WatchedFolder:
    """Accepts the files of a folder and its subfolders, the oldest first.

    A file is taken once its size and time are the same at two looks. It is copied, so that it may lie on another file
    system, and stays until its copy is accepted. Then it is left, deleted or moved, the latter two only if it is still
    unchanged ten seconds later: the program that writes it may only have paused. Symbolic links are not followed.

    Names of files may hold patient data. They are names of jobs, and in no log.

    Parameters
    ----------
    config
        The folder, and what happens to an accepted file.
    accept
        Accepts an object: on return it is on the disk and in the queue. A repeated key makes no second job.
    incoming
        Folder for copies, from which `accept` moves them.
    check_room
        Raises an `IntakeError` if an object of so many bytes would not be accepted.
    clock
        Returns seconds, for pauses.

    Raises
    ------
    OSError
        If the record of accepted files, beside `incoming`, cannot be read.
    """

    def __init__(
        self,
        config: FolderIntakeConfig,
        accept: Callable[[IncomingObject], Job],
        incoming: Path,
        check_room: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._accept, self._incoming = config, accept, incoming
        self._check_room, self._clock = check_room, clock
        # Two folders may hold files with the same relative path, size and time.
        identity = encode_text(config.path.absolute().as_posix())
        digest = hashlib.sha256(identity).hexdigest()[:8]
        self._key_prefix = f"folder:{digest}:"
        self._keys = AcceptedKeys(incoming.parent / f"folder-{digest}.accepted")
        self._monitor = CallMonitor()
        self._scan = FolderScan(config.path, ACCEPTED_FOLDER if config.after == "move" else "", self._monitor)
        self._settling: dict[str, tuple[SeenFile, float]] = {}  # accepted, to be deleted or moved
        self._resume_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="echoquad-intake-folder", daemon=True)
        self._intake_error = self._share_error = ""
        self._waiting = self._ignored = self._accepted = self._failures = self._faults = 0
        self._poll_s = 0.0

    def start(self) -> None:
        """Start to watch. Everything that is in the folder counts."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, within two seconds; one that a share blocks ends when its call returns."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)

    def status(self) -> dict[str, Any]:
        """Return the state of the intake.

        ``state`` is ``ok``, ``unreachable`` if the folder cannot be listed, ``blocked`` if a call to its file system
        has not returned for a second, or ``full`` while the queue or the disk is. ``waiting`` counts files to be
        accepted, ``ignored`` those that are no frames, ``failures`` attempts to take a file that failed, and ``faults``
        errors in EchoQuad itself that the thread has survived.
        """
        blocked = self._monitor.seconds
        if blocked >= _BLOCKED_S:
            state, error = "blocked", f"the folder has not answered for {blocked:.0f} s; check the share"
        elif self._share_error:
            state, error = "unreachable", self._share_error
        else:
            state, error = ("full", self._intake_error) if self._intake_error else ("ok", "")
        return {
            "path": str(self._config.path),
            "ok": state == "ok",
            "state": state,
            "error": error or None,
            "waiting": self._waiting,
            "accepted": self._accepted,
            "ignored": self._ignored,
            "unreadable_folders": self._scan.unreadable,
            "failures": self._failures,
            "faults": self._faults,
            "poll_ms": round(1000 * self._poll_s, 1),
        }

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._poll()
            except Exception as error:
                self._count_fault(error)
            slowest = max(self._config.poll_s, _SLOWEST_POLL_S)
            self._stopping.wait(min(max(self._config.poll_s, _IDLE_SHARE * self._poll_s), slowest))

    def _poll(self) -> None:
        """Look once, take what nobody writes to any more, and delete or move what was accepted."""
        began = time.monotonic()
        try:
            self._scan.look()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if not self._share_error:
                _LOGGER.warning("the watched folder cannot be listed (%s)", reason)
            self._share_error = f"the folder cannot be listed ({reason}); check that it exists and may be read"
            return
        finally:
            self._poll_s = time.monotonic() - began
        if self._share_error:
            _LOGGER.info("the watched folder is back")
            self._share_error = ""
        self._settle()
        self._take_all()

    def _take_all(self) -> None:
        now = self._clock()
        open_files = [(seen.mtime_ns, path, seen) for path, seen in self._scan.files.items() if not seen.done]
        self._waiting = len(open_files)
        if now < self._resume_at:
            return
        ignored = self._ignored
        for _, path, seen in sorted(open_files, key=lambda item: item[:2]):
            if self._stopping.is_set():
                return
            if not seen.stable or seen.retry_at > now:
                continue
            try:
                self._take(path, seen)
                self._intake_error = ""
            except IntakeError as error:
                self._intake_error = str(error)
                self._resume_at = self._clock() + min(max(error.retry_after, 0.1), _LONGEST_PAUSE_S)
                break
            except FileNotFoundError:  # somebody has removed it; the next look forgets it
                continue
            except OSError as error:
                self._postpone(seen, error.strerror or type(error).__name__)
            except Exception as error:
                self._count_fault(error)
                self._postpone(seen, f"unexpected {type(error).__name__}")
                break  # it may be the store that fails; another file is tried at the next look
            self._waiting -= seen.done
        if self._ignored > ignored:
            _LOGGER.warning("%d more files of the watched folder are no frames and stay", self._ignored - ignored)

    def _take(self, path: str, seen: SeenFile) -> None:
        """Accept a file.

        Raises
        ------
        IntakeError
            If nothing is accepted for now.
        OSError
            If it cannot be read.
        """
        if seen.kind == "other":
            self._ignored += 1
            seen.done = True
            return
        if not seen.size:  # some programs create a file, and write it when they are ready
            return
        key = self._key(path, seen)
        if key not in self._keys:
            self._check_room(seen.size)
            copy = self._incoming / f"folder-{uuid.uuid4().hex}{PurePosixPath(path).suffix.lower()}"
            try:
                if not self._copy(path, seen, copy):
                    return
                self._accept(IncomingObject(copy, "folder", _name(path), key))
            finally:
                copy.unlink(missing_ok=True)  # that of a repeated key, or of one that was not accepted
            self._accepted += 1
            if self._config.after == "leave":
                self._remember(key)
        seen.done = True
        if self._config.after != "leave":
            self._settling[path] = (seen, self._clock() + _SETTLE_S)

    def _key(self, path: str, seen: SeenFile) -> str:
        return f"{self._key_prefix}{_name(path)}:{seen.size}:{seen.mtime_ns}"

    def _remember(self, key: str) -> None:
        files = self._scan.files
        try:
            self._keys.add(key)
            self._keys.forget_others(lambda: (self._key(path, seen) for path, seen in files.items()), len(files))
        except OSError as error:  # the store knows the key too
            self._count_failure("is accepted, which cannot be recorded", error.strerror or type(error).__name__)

    def _copy(self, path: str, seen: SeenFile, copy: Path) -> bool:
        """Copy a file; return False if it has changed since the look, or is not to be read."""
        with self._monitor.watch():
            descriptor = os.open(self._config.path / path, _OPEN_FLAGS)
            with os.fdopen(descriptor, "rb", buffering=0) as source:
                if not seen.is_version(os.fstat(descriptor)):
                    seen.stable = False
                    return False
                data = source.read(_COPY_BYTES)
                if seen.kind == "unknown" and not is_dicom(data[:HEAD_BYTES]):
                    seen.kind, seen.done = "other", True
                    self._ignored += 1
                    return False
                size = 0
                with _open_copy(copy) as target:
                    while data and size <= seen.size:
                        size += len(data)
                        _write(target, data)
                        self._monitor.beat()
                        data = source.read(_COPY_BYTES)
                    self._monitor.beat()
                if size == seen.size and seen.is_version(os.fstat(descriptor)):
                    return True
        seen.stable = False
        return False

    def _settle(self) -> None:
        """Delete or move what was accepted some time ago and has not changed since."""
        now = self._clock()
        for path, (seen, due) in list(self._settling.items()):
            if self._stopping.is_set():
                return
            if self._scan.files.get(path) is not seen:  # changed: it is another object; or gone
                del self._settling[path]
            elif due <= now:
                try:
                    with self._monitor.watch():
                        self._remove(path, seen)
                    del self._settling[path]
                except OSError as error:
                    seen.attempts += 1
                    self._settling[path] = (seen, now + min(_SETTLE_S * 2**seen.attempts, 10 * _LONGEST_PAUSE_S))
                    self._count_failure("cannot be deleted or moved", error.strerror or type(error).__name__)

    def _remove(self, path: str, seen: SeenFile) -> None:
        source = self._config.path / path
        try:
            if not seen.is_version(source.lstat()):
                return  # the next check of the file finds it
        except FileNotFoundError:
            return
        if self._config.after == "delete":
            source.unlink(missing_ok=True)
        else:
            target = _reserve(self._config.path / ACCEPTED_FOLDER / path)
            try:
                source.replace(target)
            except OSError:
                target.unlink()
                raise
        self._scan.files.pop(path, None)

    def _postpone(self, seen: SeenFile, reason: str) -> None:
        seen.attempts += 1
        seen.retry_at = self._clock() + min(2.0**seen.attempts, _LONGEST_PAUSE_S)
        if seen.attempts == 1:
            self._count_failure("cannot be taken", reason)

    def _count_failure(self, what: str, reason: str) -> None:
        self._failures += 1
        _LOGGER.warning("a file of the watched folder %s (%s)", what, reason)

    def _count_fault(self, error: Exception) -> None:
        self._faults += 1
        _LOGGER.error("the watched folder: unexpected %s", type(error).__name__)


def _name(path: str) -> str:
    """Return a path as text that can be encoded: a byte of it that is not UTF-8 is escaped."""
    return encode_text(path).decode()


def _open_copy(copy: Path) -> FileIO:
    """Create the file for a copy; the disk of the queue refuses, not the share."""
    try:
        return FileIO(copy, "x")
    except OSError as error:
        raise _incoming_error(error) from error


def _write(target: FileIO, data: bytes) -> None:
    try:
        write_all(target, data)
    except OSError as error:
        raise _incoming_error(error) from error


def _incoming_error(error: OSError) -> IntakeError:
    reason = error.strerror or type(error).__name__
    return IntakeError(f"the folder for incoming files cannot be written ({reason}); check space and permissions")


def _reserve(target: Path) -> Path:
    """Create an empty file to be replaced, named like `target`, with a number if that name is taken; return its path.

    A rename alone would overwrite what has the name.
    """
    make_folder(target.parent)
    for number in range(1, _MOST_NAMES + 1):
        path = target if number == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        try:
            path.open("xb").close()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(errno.EEXIST, f"{_MOST_NAMES} files have this name")
