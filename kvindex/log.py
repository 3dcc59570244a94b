"""Logging of a kvlane process: structlog to stderr, lines for people on a terminal, JSON elsewhere."""

from __future__ import annotations

import enum
import logging
import sys
import traceback

import structlog
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

# Tracebacks show no local variables: prompts and keys are among them.
_FOR_PEOPLE = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
_FOR_MACHINES = [
    ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
    structlog.processors.JSONRenderer(),
]


class LogLevel(enum.StrEnum):
    """What is logged, from most to least."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def frames(error: BaseException) -> list[str]:
    """Return where an error came from, outermost first, without its message.

    For errors in handling what a client sent, which the message may repeat.
    """
    places = traceback.extract_tb(error.__traceback__)
    return [f"{place.filename}:{place.lineno} {place.name}" for place in places]


def configure_logging(level: LogLevel) -> None:
    """Set up structlog for this process; to be called once, before the first line."""
    people = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people),
            *(_FOR_PEOPLE if people else _FOR_MACHINES),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
