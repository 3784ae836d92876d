"""`python -m tests.conformance --url http://127.0.0.1:8080 --model demo`, or `make conformance`."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.conformance import catalogue, report, runner
from tests.conformance.server import Broken, Server


def main(arguments: list[str] | None = None) -> int:
    """Judge a server and print the table; 1 where it cannot be reached, or with `--strict` does not show everything."""
    asked = _parser().parse_args(arguments)
    behaviours = catalogue.load(asked.only, with_key=bool(asked.key))
    if asked.list:
        _print(f"{behaviour.id}: {behaviour.sentence}" for behaviour in behaviours)
        return 0
    server = Server(asked.url, asked.model, asked.key or None)
    try:
        server.ask("GET", "/v1/models")
    except Broken as error:
        sys.stderr.write(f"{asked.url} cannot be reached: {error}\n")
        return 1
    results = runner.run(
        server, behaviours, asked.max_seconds, _tell if sys.stderr.isatty() else lambda _: None
    )
    _print(report.table(results, with_all=asked.all))
    server.close()
    return int(asked.strict and not all(result.shown for result in results))


def _tell(result: runner.Result) -> None:
    sys.stderr.write("." if result.shown else "x")
    sys.stderr.flush()


def _print(lines: object) -> None:
    assert hasattr(lines, "__iter__")
    for line in lines:
        sys.stdout.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server, with or without /v1")
    parser.add_argument("--model", default="demo", help="model to ask for (default: demo)")
    parser.add_argument("--key", default="", help="API key, if it asks for one")
    parser.add_argument("--only", default="", metavar="TEXT", help="behaviours with TEXT in their id")
    parser.add_argument("--max-seconds", type=float, default=900.0, help="for all together (default: 900)")
    parser.add_argument("--strict", action="store_true", help="fail where a behaviour is not shown")
    parser.add_argument("--all", action="store_true", help="a line for what is shown, too")
    parser.add_argument("--list", action="store_true", help="print the catalogue and ask nobody")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
