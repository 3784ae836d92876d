"""Conversations with long prompts: all first turns together, then all second turns, in one process.

`python -m bench.turns` interleaves rounds of the worker's engine, which finds the first turns in its prefix cache, and of mlx-lm's
`BatchGenerator` alone, whose second turns begin from scratch, and once more with the caches that it returned after the first.
Prompts are random tokens, new in each round; answers are greedy and of one length.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.meter import wait_until_quiet
from bench.harness.table import Table, say
from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from common.settings import Settings
from worker.mlx.engine import MLXEngine
from worker.models import model_folder

PATIENCE_SECONDS = 60.0
SEED = 1
NUM_CONVERSATIONS = (1, 16)

FIRST, SECOND, SECOND_FROM_SCRATCH = "first turns", "second turns", "second turns from scratch"


@dataclass
class Turns:
    """One turn of several conversations.

    Attributes:
        seconds: Until the last answer was complete.
        first_seconds: By conversation: until its first token.
        answers: By conversation: its tokens.
        caches: By conversation: mlx-lm's caches at its end.
    """

    seconds: float = 0.0
    first_seconds: dict[Any, float] = field(default_factory=dict)
    answers: dict[Any, list[int]] = field(default_factory=dict)
    caches: dict[Any, Any] = field(default_factory=dict)

    def add(self, conversation: Any, token_id: int, seconds: float) -> None:
        """Record a token."""
        self.first_seconds.setdefault(conversation, seconds)
        self.answers.setdefault(conversation, []).append(token_id)
        self.seconds = seconds


def ours(engine: MLXEngine, prompts: Sequence[list[int]], num_tokens: int) -> Turns:
    """Answer all prompts with the worker's engine."""
    turns, began = Turns(), time.perf_counter()
    for number, prompt in enumerate(prompts):
        job = GenerationJob(
            job_id=f"{number:032d}",
            model="m",
            channel="c",
            prompt=TokenPrompt(prompt),
            max_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        )
        engine.insert(job, prompt, [])
    while engine.num_sequences:
        for event in engine.step():
            turns.add(int(event.job_id), event.token_id, time.perf_counter() - began)  # type: ignore[union-attr]
    return turns


def alone(engine: MLXEngine, prompts: Sequence[list[int]], num_tokens: int, caches: Any = None) -> Turns:
    """As `ours`, with mlx-lm's own batch.

    Args:
        caches: By prompt: mlx-lm's caches with the beginning of that prompt.
    """
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    generator: Any = BatchGenerator(
        engine._model,  # noqa: SLF001 (loaded once for both)
        completion_batch_size=len(prompts),
        stream=mx.default_stream(mx.default_device()),
    )
    generator.close()  # so that no memory stays wired, as in a worker
    turns, began = Turns(), time.perf_counter()
    rest = (
        [prompt[own[0].offset :] for prompt, own in zip(prompts, caches, strict=True)] if caches else prompts
    )
    uids = generator.insert(rest, max_tokens=[num_tokens] * len(prompts), caches=caches)
    number_of = {uid: number for number, uid in enumerate(uids)}
    while len(turns.caches) < len(prompts):
        for response in generator.next()[1]:
            number = number_of[response.uid]
            turns.add(number, response.token, time.perf_counter() - began)
            if response.finish_reason is not None:
                turns.caches[number] = response.prompt_cache
    return turns


class Conversations:
    """The prompts of one round."""

    def __init__(
        self, arguments: argparse.Namespace, num_conversations: int, number: int, vocab: int
    ) -> None:
        self._rng = random.Random(SEED + number)  # noqa: S311 (the same each time)
        self._vocab = vocab
        self._num_new = arguments.new_tokens
        shortest, longest = arguments.prompt_tokens
        self.first = [self._tokens(self._rng.randint(shortest, longest)) for _ in range(num_conversations)]

    def second(self, turns: Turns) -> list[list[int]]:
        """Their second turns, after these answers."""
        return [
            [*prompt, *turns.answers[number], *self._tokens(self._num_new)]
            for number, prompt in enumerate(self.first)
        ]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocab) for _ in range(count)]


def measure_ours(engine: MLXEngine, conversations: Conversations, num_tokens: int) -> dict[str, Turns]:
    """Both turns with the worker's engine."""
    first = ours(engine, conversations.first, num_tokens)
    return {FIRST: first, SECOND: ours(engine, conversations.second(first), num_tokens)}


def measure_alone(engine: MLXEngine, conversations: Conversations, num_tokens: int) -> dict[str, Turns]:
    """Both turns with mlx-lm's own batch, the second with and without its caches."""
    first = alone(engine, conversations.first, num_tokens)
    prompts = conversations.second(first)
    caches = [first.caches[number] for number in range(len(prompts))]
    return {
        FIRST: first,
        SECOND_FROM_SCRATCH: alone(engine, prompts, num_tokens),
        SECOND: alone(engine, prompts, num_tokens, caches),
    }


def cells(own: list[Turns], other: list[Turns]) -> list[str]:
    """The cells of a row, each of several rounds: for both, the median time and the median and last first token in ms; the ratio of the times."""
    ratios = [theirs.seconds / mine.seconds for mine, theirs in zip(own, other, strict=True)]
    written = []
    for rounds in (other, own):
        total = statistics.median(each.seconds for each in rounds)
        middle = statistics.median(statistics.median(each.first_seconds.values()) for each in rounds)
        last = statistics.median(max(each.first_seconds.values()) for each in rounds)
        written.append(f"{1000 * total:,.0f} ({1000 * middle:,.0f}, {1000 * last:,.0f})")
    return [*written, f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.turns", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--conversations", type=int, nargs="+", default=list(NUM_CONVERSATIONS), metavar="N")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[2000, 4000], metavar="N")
    parser.add_argument("--answer-tokens", type=int, default=100, metavar="N")
    parser.add_argument(
        "--new-tokens", type=int, default=40, metavar="N", help="of the second turn's message"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, max_batch=max(arguments.conversations))
    engine = MLXEngine(settings, model_folder.find(settings))
    table = Table(
        [
            "conversations",
            "",
            "alone, ms (first token: median, last)",
            "the worker's engine",
            "alone ÷ engine",
        ]
    )
    for count in arguments.conversations:
        wait_until_quiet(PATIENCE_SECONDS)
        own: list[dict[str, Turns]] = []
        other: list[dict[str, Turns]] = []
        for number in range(-1, arguments.rounds):  # the first round warms up and is not counted
            conversations = Conversations(arguments, count, number, engine.info.vocab_size)
            steps = [(own, measure_ours), (other, measure_alone)]
            for results, measure in steps if number % 2 else reversed(steps):
                results.append(measure(engine, conversations, arguments.answer_tokens))
        for turn in (FIRST, SECOND_FROM_SCRATCH, SECOND):
            mine = SECOND if turn == SECOND_FROM_SCRATCH else turn
            row = cells([each[mine] for each in own[1:]], [each[turn] for each in other[1:]])
            name = turn if turn == mine else f"{SECOND}; alone from scratch"
            table.add([str(count), name, *row])
    shortest, longest = arguments.prompt_tokens
    say(
        f"prompts of {shortest} to {longest} tokens, answers of {arguments.answer_tokens}; median and range of {arguments.rounds} rounds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
