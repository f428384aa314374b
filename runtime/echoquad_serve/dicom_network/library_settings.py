"""What pydicom and pynetdicom must not do in a service: log and warn with values of what they decode."""

from __future__ import annotations

import logging

import pydicom.config
import pynetdicom

__all__ = ["silence_libraries"]


def silence_libraries() -> None:
    """Silence logs and warnings of pydicom and pynetdicom, since their messages have UIDs and other values.

    The service logs what matters itself. Both settings apply to the whole process.
    """
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"  # else each message and PDU is formatted for the log
    for name in ("pydicom", "pynetdicom"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.setLevel(logging.CRITICAL + 1)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
