"""Long prompts: what they do to others, and what the second turn of a conversation costs; beside mlx_lm.server.

`python -m bench.long_prompt` starts the pool, then the stock server, on the same model, and asks both the same:
a request for 4 tokens, alone and beside a 3,000-token prompt that is being read; the longest gap of a stream that runs
meanwhile; the first token of a 4,000-token conversation, and of its second turn.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from bench.harness.meter import wait_until_quiet
from bench.harness.pool import Pool, free_port
from bench.harness.table import Table, say
from worker.models.demo_model import ensure_demo_model

MODEL = "demo"
LONG_TOKENS = 3000
CONVERSATION_TOKENS = 4000
SHORT: list[Any] = [{"role": "user", "content": "Say hello."}]
START_SECONDS = 120.0
PATIENCE_SECONDS = 60.0
STOCK_MODEL = "default_model"
"""What mlx_lm.server calls the one that it was started with."""

_WORDS = "the fox and the hen went up a hill to look at the sea and the old ship in the bay "


@dataclass
class Figures:
    """Seconds; see the module."""

    short_alone: float = 0.0
    short_beside: float = 0.0
    long_prompt: float = 0.0
    longest_gap: float = 0.0
    first_turn: float = 0.0
    second_turn: float = 0.0


@dataclass
class Timed:
    """A request in a thread of its own.

    Attributes:
        arrivals: Monotonic seconds at which pieces of text came.
    """

    ask: Callable[[], Any]
    began_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    is_wanted: bool = True

    def run(self) -> None:
        """Stream it to its end, or until it is not wanted any more."""
        self.began_at = time.perf_counter()
        stream = self.ask()
        for chunk in stream:
            if not self.is_wanted:
                stream.close()
                return
            if chunk.choices and chunk.choices[0].delta.content:
                self.arrivals.append(time.perf_counter())
                self.text += chunk.choices[0].delta.content

    def begin(self) -> threading.Thread:
        """Stream it beside others."""
        thread = threading.Thread(target=self.run)
        thread.start()
        return thread

    @property
    def seconds(self) -> float:
        """To the last piece."""
        return self.arrivals[-1] - self.began_at

    @property
    def first_seconds(self) -> float:
        """To the first."""
        return self.arrivals[0] - self.began_at


def measure(client: openai.OpenAI, model: str) -> Figures:
    """Ask one server, when nothing else is going on."""
    wait_until_quiet(PATIENCE_SECONDS)

    def chat(messages: list[Any], max_tokens: int) -> Timed:
        return Timed(
            lambda: client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
            )
        )

    figures = Figures()
    chat(SHORT, 4).run()  # the first request of all compiles kernels
    short = chat(SHORT, 4)
    short.run()
    figures.short_alone = short.seconds

    running, long = chat([_user(1, 20)], 2000), chat([_user(2, LONG_TOKENS)], 1)
    threads = [running.begin()]
    _wait(lambda: len(running.arrivals) > 5)  # noqa: PLR2004
    threads.append(long.begin())
    time.sleep(1.0)  # its prompt is being read
    short = chat([*SHORT, {"role": "assistant", "content": "Hello!"}, _user(3, 5)], 4)
    short.run()
    threads[1].join()
    end_at = time.perf_counter()
    figures.short_beside, figures.long_prompt = short.seconds, long.seconds
    arrivals = [at for at in running.arrivals if long.began_at <= at <= end_at]
    edges = [long.began_at, *arrivals, end_at]
    figures.longest_gap = max(later - earlier for earlier, later in itertools.pairwise(edges))
    running.is_wanted = False
    threads[0].join()

    turn = chat([_user(4, CONVERSATION_TOKENS)], 8)
    turn.run()
    again = chat([_user(4, CONVERSATION_TOKENS), {"role": "assistant", "content": turn.text}, *SHORT], 8)
    again.run()
    figures.first_turn, figures.second_turn = turn.first_seconds, again.first_seconds
    return figures


def _user(number: int, num_tokens: int) -> dict[str, str]:
    """About so many tokens; no two numbers begin alike."""
    words = (f"{number}. " + _WORDS * (num_tokens // 19 + 1)).split(" ")
    return {"role": "user", "content": " ".join(words[:num_tokens])}


def _wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("a server takes too long")
        time.sleep(0.05)


@contextmanager
def pool_client() -> Iterator[openai.OpenAI]:
    """Our pool, with one worker."""
    with Pool() as pool:
        pool.start_api()
        pool.start_worker(["worker", "--model", MODEL], MODEL)
        yield openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=600)


@contextmanager
def stock_client() -> Iterator[openai.OpenAI]:
    """mlx_lm.server, started as it comes, with OpenBLAS where that is there."""
    port = free_port()
    code = (
        "from worker.mlx.model import preload_blas; preload_blas(); import sys; "
        f"sys.argv = ['server', '--model', {str(ensure_demo_model(None))!r}, '--port', '{port}']; "
        "from mlx_lm.server import main; main()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: _answers(url))
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/v1/models", timeout=5).is_success
    except httpx2.HTTPError:
        return False


def main() -> int:
    """Measure both and print a table of seconds."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = Table(["seconds", "mlx-pool", "mlx_lm.server", "ratio"])
    say("mlx-pool ...")
    with pool_client() as client:
        ours = measure(client, MODEL)
    say(f"{ours}; mlx_lm.server ...")
    with stock_client() as client:
        stock = measure(client, STOCK_MODEL)
    for name, words in (
        ("short_alone", "4 tokens, alone"),
        ("short_beside", f"4 tokens beside a {LONG_TOKENS}-token prompt"),
        ("long_prompt", "that prompt's first token"),
        ("longest_gap", "longest gap of a stream meanwhile"),
        ("first_turn", f"first token of a {CONVERSATION_TOKENS}-token conversation"),
        ("second_turn", "first token of its second turn"),
    ):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        table.add([words, f"{mine:.2f}", f"{theirs:.2f}", f"{theirs / mine:.1f}"])
    say("ratio: mlx_lm.server ÷ mlx-pool")
    return 0


if __name__ == "__main__":
    sys.exit(main())
