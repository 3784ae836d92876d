"""`python -m tests.conformance --url http://127.0.0.1:8080 --model demo`, or `make conformance`."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.conformance import catalogue, report, runner
from tests.conformance.server import Broken, Server


def main(arguments: list[str] | None = None) -> int:
    """Check a server and print the report. Returns 1 if it cannot be reached, or with `--strict` if a behavior is not shown."""
    asked = _parser().parse_args(arguments)
    behaviors = catalogue.load(asked.only, with_key=bool(asked.key))
    if asked.list:
        _print(f"{behavior.id}: {behavior.sentence}" for behavior in behaviors)
        return 0
    server = Server(asked.url, asked.model, asked.key or None)
    try:
        server.ask("GET", "/v1/models")
    except Broken as error:
        sys.stderr.write(f"{asked.url} cannot be reached: {error}\n")
        return 1
    results = runner.run(
        server, behaviors, asked.max_seconds, _print_progress if sys.stderr.isatty() else lambda _: None
    )
    _print(report.table(results, with_all=asked.all))
    server.close()
    return int(asked.strict and not all(result.shown for result in results))


def _print_progress(result: runner.Result) -> None:
    sys.stderr.write("." if result.shown else "x")
    sys.stderr.flush()


def _print(lines: object) -> None:
    assert hasattr(lines, "__iter__")
    for line in lines:
        sys.stdout.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--url", default="http://127.0.0.1:8080", help="base URL of the server, with or without /v1"
    )
    parser.add_argument("--model", default="demo", help="model to use (default: demo)")
    parser.add_argument("--key", default="", help="API key, if the server requires one")
    parser.add_argument("--only", default="", metavar="TEXT", help="only behaviors whose id contains TEXT")
    parser.add_argument(
        "--max-seconds", type=float, default=900.0, help="limit for the whole run (default: 900)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a behavior is not shown")
    parser.add_argument(
        "--all", action="store_true", help="also print a line for each behavior that is shown"
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue without sending requests")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it silently
    sys.exit(main())
