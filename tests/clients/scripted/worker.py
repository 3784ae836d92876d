"""A worker with a scripted engine: `python -m tests.clients.scripted.worker --name MODEL_ID --tokens-per-second R`.

The real worker: RQ, leases, journal, generation loop, template, grammar, parser. Only the choice of tokens is a script's:
`task` for coding agents, `assistant` for SDKs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common.settings import Settings
from tests.clients.scripted import assistant, task
from worker.__main__ import WorkerFlags, run
from worker.models import model_folder

SCRIPTS = {"assistant": assistant.answer, "task": task.answer}


def main(argv: list[str] | None = None) -> int:
    """Run a scripted worker; returns the exit status."""
    flags = WorkerFlags(
        "python -m tests.clients.scripted.worker", "A worker whose answers come from a script."
    )
    flags.parser.add_argument("--script", choices=SCRIPTS, default="task")
    flags.parser.add_argument("--tokens-per-second", type=float, default=1000.0, metavar="R")
    flags.parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append what happens, as lines of JSON"
    )
    flags.parser.add_argument(
        "--holds", type=Path, metavar="FOLDER", help="answers named there stop half-way"
    )

    def make_engine(settings: Settings) -> object:
        from tests.clients.scripted.engine import ScriptedEngine

        return ScriptedEngine(
            model_folder.find(settings),
            SCRIPTS[flags.arguments.script],
            max_batch=settings.max_batch,
            tokens_per_second=flags.arguments.tokens_per_second,
            record=flags.arguments.record,
            holds=flags.arguments.holds,
        )

    return run(flags, make_engine, argv)  # type: ignore[arg-type]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as `worker.__main__`: MLX's threads may abort the process at interpreter shutdown
