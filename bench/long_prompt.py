"""Long prompts: how much they delay other requests, and what the second turn of a conversation costs, against mlx_lm.server.

`python -m bench.long_prompt` starts the pool, then mlx_lm.server, on the same model, and sends both the same requests: 4 tokens,
alone and while a 3,000-token prompt is prefilled; the longest gap of a stream that runs meanwhile; time to first token of a
4,000-token conversation, and of its second turn.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from bench.contest.contenders import STOCK_SERVER, server
from bench.harness.meter import wait_until_quiet
from bench.harness.pool import Pool
from bench.harness.table import Table, say
from worker.models.demo_model import ensure_demo_model

MODEL = "demo"
LONG_TOKENS = 3000
CONVERSATION_TOKENS = 4000
SHORT: list[Any] = [{"role": "user", "content": "Say hello."}]
START_SECONDS = 120.0
PATIENCE_SECONDS = 60.0
NUM_STREAMS = 32
"""Maximum batch size of mlx_lm.server, as of our worker."""

_WORDS = "the fox and the hen went up a hill to look at the sea and the old ship in the bay "


@dataclass
class Figures:
    """Seconds; see the module."""

    short_alone: float = 0.0
    short_during_prefill: float = 0.0
    long_prompt: float = 0.0
    longest_gap: float = 0.0
    first_turn: float = 0.0
    second_turn: float = 0.0


@dataclass
class Timed:
    """A streamed request, timed.

    Attributes:
        arrivals: Monotonic seconds of each chunk with text.
    """

    ask: Callable[[], Any]
    began_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    is_wanted: bool = True

    def run(self) -> None:
        """Read the stream to its end, or until `is_wanted` is false."""
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
        """Run in a thread."""
        thread = threading.Thread(target=self.run)
        thread.start()
        return thread

    @property
    def seconds(self) -> float:
        """From the request to the last chunk."""
        return self.arrivals[-1] - self.began_at

    @property
    def first_seconds(self) -> float:
        """From the request to the first chunk."""
        return self.arrivals[0] - self.began_at


def measure(url: str, model: str) -> Figures:
    """Measure one server, once the machine is idle."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    wait_until_quiet(PATIENCE_SECONDS)

    def chat(messages: list[Any], max_tokens: int) -> Timed:
        return Timed(
            lambda: client.chat.completions.create(
                model=model, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
            )
        )

    figures = Figures()
    chat(SHORT, 4).run()  # warm-up: the first request compiles kernels
    short = chat(SHORT, 4)
    short.run()
    figures.short_alone = short.seconds

    running, long = chat([_user(1, 20)], 2000), chat([_user(2, LONG_TOKENS)], 1)
    threads = [running.begin()]
    _wait_until(lambda: len(running.arrivals) > 5)  # noqa: PLR2004
    threads.append(long.begin())
    time.sleep(1.0)  # its prompt is being prefilled
    short = chat([*SHORT, {"role": "assistant", "content": "Hello!"}, _user(3, 5)], 4)
    short.run()
    threads[1].join()
    end_at = time.perf_counter()
    figures.short_during_prefill, figures.long_prompt = short.seconds, long.seconds
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
    """A message of about `num_tokens` tokens; messages of different numbers share no prefix."""
    words = (f"{number}. " + _WORDS * (num_tokens // 19 + 1)).split(" ")
    return {"role": "user", "content": " ".join(words[:num_tokens])}


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a server did not answer within {START_SECONDS:g} s")
        time.sleep(0.05)


def main() -> int:
    """Measure both and print a table of seconds."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    table = Table(["seconds", "mlx-pool", "mlx_lm.server", "ratio"])
    say("mlx-pool ...")
    with Pool() as pool:
        pool.start_api()
        pool.start_worker(["worker", "--model", MODEL], MODEL)
        ours = measure(pool.url, MODEL)
    say(f"{ours}; mlx_lm.server ...")
    with server("mlx_lm.server", STOCK_SERVER, str(ensure_demo_model(None)), NUM_STREAMS) as stock_server:
        stock = measure(stock_server.url, stock_server.model)
    for name, words in (
        ("short_alone", "4 tokens, alone"),
        ("short_during_prefill", f"4 tokens during the prefill of a {LONG_TOKENS}-token prompt"),
        ("long_prompt", "first token of that prompt"),
        ("longest_gap", "longest gap of another stream meanwhile"),
        ("first_turn", f"first token of a {CONVERSATION_TOKENS}-token conversation"),
        ("second_turn", "first token of its second turn"),
    ):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        table.add([words, f"{mine:.2f}", f"{theirs:.2f}", f"{theirs / mine:.1f}"])
    say("ratio: mlx_lm.server ÷ mlx-pool")
    return 0


if __name__ == "__main__":
    sys.exit(main())
