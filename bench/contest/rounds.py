"""Throughput and latency of the pool with a real model, against mlx-lm's batch without a server, and against other servers.

`python -m bench.contest` has all contenders answer the same prompts, greedily, in one run: mlx-lm's `BatchGenerator` alone; the
pool over HTTP; mlx_lm.server; and any other server (`--server 'NAME=COMMAND {model} {port}'`). Rounds are interleaved, and the
order rotates, so that all see the same machine. `--mix` gives four of five streams a seed, penalties, log-probabilities or a grammar
(with answers up to 800 tokens long); the other mixes are in `bench.contest.mixes`. `--json FILE` saves the
results for `python -m bench.contest.plot` and `python -m bench.contest.collect`. `--model-cpus N` pins the
processes that run the model to N CPUs, the same for all contenders of a round (`bench.contest.placement`). The exit status is 1 if a
stream of the pool failed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.contest import mixes, results
from bench.contest.contenders import STOCK_SERVER, Alone, Contender, Figures, OneAtATime, Served, started
from bench.contest.mixes import RequestKind
from bench.contest.placement import Placement
from bench.contest.raw_generator import RawGenerator
from bench.contest.results import Summary
from bench.harness.meter import busy_seconds, wait_until_quiet
from bench.harness.pool import Pool
from bench.harness.prompts import prompts
from bench.harness.table import Table, percentile, say
from worker.models.demo_model import ensure_demo_model

POOL = "mlx-pool"
STOCK = "mlx_lm.server"
NUM_STREAMS = (1, 8, 16, 32)
COLUMNS = (
    "streams",
    "contender",
    "tokens/s",
    "÷ alone",
    "rounds",
    "first token ms, p50",
    "p99",
    "gap ms, p50",
    "p99",
    "failed streams",
    "CPU ms per token",
    "CPUs used by others",
)


@dataclass(frozen=True, slots=True)
class Round:
    """One contender's round, and the CPU usage meanwhile."""

    figures: Figures
    cpu_seconds: dict[str, float]
    others: float


def measure(
    contender: Contender, kinds: Sequence[RequestKind], number: int, arguments: argparse.Namespace
) -> Round:
    """Run one round when the machine is quiet.

    Args:
        kinds: Of each stream's request.
        number: Determines the prompts.
    """
    wait_until_quiet(arguments.patience)
    began, busy, used, own = time.monotonic(), busy_seconds(), contender.cpu_seconds(), time.process_time()
    figures = contender.run(prompts(len(kinds), number), arguments.max_tokens, kinds)
    cpu = {role: seconds - used.get(role, 0.0) for role, seconds in contender.cpu_seconds().items()}
    cpu["client"] = time.process_time() - own
    seconds = time.monotonic() - began
    return Round(figures, cpu, max(0.0, busy_seconds() - busy - sum(cpu.values())) / seconds)


def summary(
    name: str, num_streams: int, rounds: Sequence[Round], alone: Sequence[Round], conditions: str = ""
) -> Summary:
    """The medians of all rounds."""
    figures = [each.figures for each in rounds]
    num_tokens = sum(each.num_tokens for each in figures) or 1
    first = [1000 * seconds for each in figures for seconds in each.first_seconds]
    roles = rounds[0].cpu_seconds
    return Summary(
        name,
        num_streams,
        statistics.median(each.tokens_per_second for each in figures),
        [a.tokens_per_second / b.figures.tokens_per_second for a, b in zip(figures, alone, strict=False)],
        (percentile(first, 50), percentile(first, 99)),
        (
            statistics.median(each.gaps_ms[0] for each in figures),
            statistics.median(each.gaps_ms[1] for each in figures),
        ),
        sum(len(each.errors) for each in figures),
        {role: 1000 * sum(each.cpu_seconds[role] for each in rounds) / num_tokens for role in roles},
        statistics.mean(each.others for each in rounds),
        conditions,
        [each.tokens_per_second for each in figures],
        [each.gaps_ms for each in figures],
    )


def conditions(mix: str, arguments: argparse.Namespace) -> str:
    """What all contenders have in common; results under other conditions cannot be put together."""
    return f"{Path(arguments.model).name}, {mix}, {arguments.max_tokens} tokens per stream"


def compare(
    contenders: Sequence[Contender],
    mix: str,
    num_streams: int,
    placement: Placement,
    arguments: argparse.Namespace,
    *,
    table: Table,
) -> list[Summary]:
    """Interleaved rounds of all contenders with one mix at one number of streams, after a greedy warm-up round.

    On a GPU the first batch of each shape takes many times as long as the next.
    """
    for contender in contenders:
        contender.run(
            prompts(num_streams, 1000 * num_streams + 999), 16, mixes.kinds(mixes.GREEDY, num_streams)
        )
    measured: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number in range(arguments.rounds):
        placement.begin(number)
        shift = number % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            measured[contender.name].append(
                measure(contender, mixes.kinds(mix, num_streams), 1000 * num_streams + number, arguments)
            )
    alone = measured.get(Alone.name, [])
    found = [
        summary(name, num_streams, rounds, alone, conditions(mix, arguments))
        for name, rounds in measured.items()
    ]
    for each in found:
        table.add(_cells(each))
        for error in sorted({e for r in measured[each.contender] for e in r.figures.errors})[:3]:
            say(f"<!-- {each.contender}: {error[:200]} -->")
    return found


def _cells(found: Summary) -> list[str]:
    ratio = f"**{statistics.median(found.ratios):.3f}**" if found.ratios else ""
    return [
        str(found.num_streams),
        found.contender,
        f"{found.tokens_per_second:,.1f}",
        ratio if found.contender != Alone.name else "1",
        " ".join(f"{each:.2f}" for each in found.ratios) if found.contender != Alone.name else "",
        *(f"{ms:,.0f}" for ms in found.first_ms),
        *(f"{ms:,.1f}" for ms in found.gaps_ms),
        str(found.num_failed),
        ", ".join(f"{role} {ms:.3g}" for role, ms in found.cpu_ms.items()),
        f"{found.others:.2f}",
    ]


@contextmanager
def all_contenders(arguments: argparse.Namespace) -> Iterator[tuple[list[Contender], Placement]]:
    """All contenders, loaded, and the placement of their processes."""
    folder = str(ensure_demo_model(None)) if arguments.model == "demo" else arguments.model
    max_streams = max(arguments.streams)
    settings = {"MLXPOOL_MODEL": arguments.model, "MLXPOOL_MAX_BATCH": str(max(32, max_streams))}
    with ExitStack() as stack:
        contenders: list[Contender] = []
        if "alone" in arguments.contenders:
            contenders.append(Alone(stack.enter_context(RawGenerator(settings))))
        pool = stack.enter_context(Pool(settings | {"MLXPOOL_MODEL_NAME": "contest"}))
        if "pool" in arguments.contenders:
            pool.start_worker(["worker", "--log-level", "WARNING"], "contest")
            pool.start_api(arguments.api_processes)
            contenders.append(
                Served(POOL, pool.url, "contest", pool.cpu_seconds, lambda: pool.pids("worker"))
            )
        if "stock" in arguments.contenders:
            contenders.append(stack.enter_context(started(STOCK, STOCK_SERVER, folder, max_streams)))
        for server in arguments.server:
            name, _, command = server.partition("=")
            contenders.append(stack.enter_context(started(name, command, folder, max_streams)))
        if "one" in arguments.contenders:
            contenders.append(OneAtATime(pool))
        placement = Placement(
            arguments.model_cpus,
            models=lambda: [pid for contender in contenders for pid in contender.model_pids()],
            others=lambda: [os.getpid(), *pool.pids("redis"), *pool.pids("api")],
        )
        yield contenders, placement


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.contest", description=__doc__)
    parser.add_argument("--model", default="demo", help="'demo' or a folder")
    parser.add_argument("--streams", type=int, nargs="+", default=list(NUM_STREAMS), metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--api-processes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=("alone", "pool", "stock", "one"),
        default=["alone", "pool", "stock"],
        help="'one' is a stock RQ SimpleWorker, one job after another",
    )
    parser.add_argument(
        "--server", action="append", default=[], metavar="NAME=COMMAND", help="another server to start"
    )
    parser.add_argument(
        "--model-cpus", type=int, default=0, metavar="N", help="CPUs for the processes that run the model"
    )
    parser.add_argument(
        "--mix",
        nargs="*",
        choices=mixes.MIXES,
        default=[mixes.GREEDY],
        metavar="MIX",
        help=f"what the requests ask for, one mix after another: {', '.join(mixes.MIXES)}; without a name: {mixes.SAMPLING}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS", help="how long to wait for a quiet machine"
    )
    arguments = parser.parse_args(argv)
    arguments.mix = arguments.mix or [mixes.SAMPLING]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Compare all contenders and print a table for each mix; the exit status."""
    arguments = parse_arguments(argv)
    found: list[Summary] = []
    with all_contenders(arguments) as (contenders, placement):
        for mix in arguments.mix:
            say(f"\n{conditions(mix, arguments)}, {arguments.rounds} rounds\n")
            table = Table(COLUMNS)
            for num_streams in arguments.streams:
                found += compare(contenders, mix, num_streams, placement, arguments, table=table)
                if arguments.json:
                    results.write(arguments.json, found)
    return int(any(each.num_failed for each in found if each.contender == POOL))
