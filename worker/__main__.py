"""`python -m worker`: one worker process. Reads the settings, checks Redis, and serves one model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from logging import getLogger

from common import connections, garbage, logging
from common.errors import StartupError
from common.settings import Settings, add_flags, from_arguments
from worker.jobs.batch_worker import BatchWorker
from worker.loop.engine import Engine
from worker.models import model_folder

log = getLogger("worker")

_SWITCH_SECONDS = 0.0005
"""The interpreter's switch interval, see `run`."""

FLAGS = (
    "model",
    "max_batch",
    "redis_url",
    "adapter_path",
    "chat_template",
    "chat_template_args",
    "use_generation_config",
    "use_default_chat_template",
    "trust_remote_code",
    "cache_limit_gb",
    "memory_limit_gb",
    "prompt_cache_gb",
    "prefill_step_tokens",
    "request_seconds",
    "queue_seconds",
    "wired_limit",
    "lease_seconds",
    "stall_seconds",
    "drain_seconds",
    "orphan_seconds",
    "journal_ttl_seconds",
    "cache_dir",
    "log_level",
)
_NAME_HELP = "model id for clients (default: made from the model's path)"


class WorkerFlags:
    """The command line of a worker. Each setting of a worker is a flag; a command may add flags of its own to `parser`."""

    def __init__(self, prog: str, description: str) -> None:
        self.parser = argparse.ArgumentParser(prog=prog, description=description)
        self.parser.add_argument(
            "--name", "--model-name", dest="model_name", metavar="MODEL_ID", help=_NAME_HELP
        )
        add_flags(self.parser, FLAGS)
        self.arguments = argparse.Namespace()

    def parse(self, argv: list[str] | None) -> Settings:
        """Parse the command line; flags take precedence over the environment.

        Raises:
            StartupError: A setting is invalid.
        """
        self.arguments = self.parser.parse_args(argv)
        return from_arguments(self.arguments)


def run(flags: WorkerFlags, make_engine: Callable[[Settings], Engine], argv: list[str] | None = None) -> int:
    """Run a worker with the engine that `make_engine` makes on the generation thread; returns the exit status."""
    # The generation thread returns from the device many times per step and then waits for the GIL, which another thread
    # may hold for 5 ms by default. On an H200, 64 streams of 256 tokens: 8,100 tokens/s by default, 10,350 with this interval.
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        settings = flags.parse(argv)
        logging.configure(settings.log_level)
        connection = connections.connect(settings.redis_url)
        connections.check(connection)
        worker = BatchWorker(
            settings, connection, settings.model_id, lambda: _make_engine(settings, make_engine)
        )
        return 0 if worker.work() else 1
    except StartupError as error:
        sys.stderr.write(f"mlx-pool worker: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _make_engine(settings: Settings, make_engine: Callable[[Settings], Engine]) -> Engine:
    engine = make_engine(settings)
    garbage.freeze_loaded_objects()
    garbage.collect_rarely()
    return engine


def _load_engine(settings: Settings) -> Engine:
    log.info("loading %s", settings.model)
    folder = model_folder.find(settings)
    try:
        from worker.mlx.engine import MLXEngine
    except ImportError as error:
        raise StartupError(f"MLX cannot be imported ({error}); `make install` installs it") from None
    return MLXEngine(settings, folder)


def main(argv: list[str] | None = None) -> int:
    """`python -m worker`; returns the exit status."""
    return run(
        WorkerFlags("python -m worker", "One worker process: one model, many requests at once."),
        _load_engine,
        argv,
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: at interpreter shutdown MLX's threads (0.32, CPU) occasionally abort the process. Its exit status
    # would then be a signal's, and a supervisor would restart a worker whose settings are invalid.
    os._exit(status)
