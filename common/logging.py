"""Logging for all processes: one line per message on standard error, never with a prompt's text or an API key."""

from __future__ import annotations

import logging
import os

from common.masking import masked

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Formatter(logging.Formatter):
    """Masks API keys, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def configure(level: str) -> None:
    """Log our messages and RQ's to standard error, from `level` up."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # RQ logs three lines per job at INFO; our own line per request has more.
    for name in ("rq.worker", "rq.job", "rq.queue", "httpx"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    # transformers warns that a prompt longer than the context "will result in indexing errors"; here it is refused with a 400.
    # It sets the level of its logger from this variable when it is imported (5.24), whatever the level was before.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
