"""The requests of a contest's mixes, and what a contest says of those that fail."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence

import pytest

from api.generation.request import GenerationRequest
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from bench.contest import mixes, rounds
from bench.contest.contenders import Alone, Figures
from bench.contest.mixes import MIXES, RequestKind
from bench.contest.placement import Placement
from bench.harness.table import Table
from bench.load.protocols import CHAT, COMPLETIONS
from bench.load.streams import Load, Stream

PARSERS: dict[str, Callable[[bytes], GenerationRequest]] = {
    CHAT.path: chat_request.parse,
    COMPLETIONS.path: completion_request.parse,
}


def _sent(kind: RequestKind) -> GenerationRequest:
    request = Load("http://127.0.0.1:1", "m").request("Hello.", 9, kind.protocol, **kind.fields)
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST " + kind.protocol.path.encode() + b" HTTP/1.1\r\n")
    return PARSERS[kind.protocol.path](body)


KINDS = [
    pytest.param(kind, id=f"{name}-{i}") for name, mixed in MIXES.items() for i, kind in enumerate(mixed)
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_accepts_each_kind(kind: RequestKind) -> None:
    """No request of a mix is refused, and none has a field that is ignored."""
    assert not _sent(kind).ignored


def test_log_probabilities_of_all_requests() -> None:
    """Each stream asks for 20."""
    assert {_sent(kind).top_logprobs for kind in mixes.kinds("logprobs", 3)} == {20}


def test_every_combination_has_log_probabilities() -> None:
    """Each request combines them with a grammar, biases, penalties, an echo, or sampling, in both protocols."""
    kinds = mixes.kinds("combined", 6)
    assert all("logprobs" in kind.fields and len(kind.fields) > 1 for kind in kinds)
    assert {kind.protocol.path for kind in kinds} == {CHAT.path, COMPLETIONS.path}
    named = {name for kind in kinds for name in kind.fields}
    assert named >= {"response_format", "logit_bias", "frequency_penalty", "echo", "seed", "top_p"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["greedy"]),
        (["--mix", "--streams", "8"], ["sampling"]),
        (["--mix", "greedy", "logprobs"], ["greedy", "logprobs"]),
    ],
)
def test_the_option(argv: list[str], expected: list[str]) -> None:
    """Without a name it is the mix that the results of earlier versions are of."""
    assert rounds.parse_arguments(argv).mix == expected


def test_streams_take_turns() -> None:
    """The default of `--mix` has one plain stream in five."""
    assert [not kind.fields for kind in mixes.kinds(mixes.SAMPLING, 6)] == [True, *4 * [False], True]


def test_a_completion_is_read() -> None:
    """Text, finish reason and usage of the legacy protocol; the end counts after tokens without text."""
    stream = Stream(b"", protocol=COMPLETIONS, keep_text=True)
    stream.feed(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices":[{"text":"Hi"}]}\n\n')
    first_at = stream.last_at
    stream.feed(b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n')
    assert stream.last_at > first_at
    stream.feed(b'data: {"choices":[],"usage":{"completion_tokens":5}}\n\ndata: [DONE]\n\n')
    assert (stream.text, stream.completion_tokens, stream.error) == ("Hi", 5, None)


class Fixed:
    """A contender whose rounds all have the same figures."""

    def __init__(self, name: str, figures: Figures) -> None:
        self.name = name
        self.figures = figures
        self.asked: list[list[RequestKind]] = []

    def run(self, _prompts: Sequence[str], _max_tokens: int, kinds: Sequence[RequestKind]) -> Figures:
        """Record what was asked for."""
        self.asked.append(list(kinds))
        return self.figures

    def cpu_seconds(self) -> dict[str, float]:
        """None was used."""
        return {}

    def model_pids(self) -> list[int]:
        """No process runs."""
        return []


def test_failed_streams_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Their number is in the table, and the reason below it; the results keep each round."""
    alone = Fixed(Alone.name, Figures(100, 1.0, [0.1], (2.0, 6.0)))
    pool = Fixed(rounds.POOL, Figures(80, 1.0, [0.1], (2.0, 8.0), errors=["status 400: no such field"]))
    arguments = argparse.Namespace(model="a/1b", max_tokens=50, rounds=2, patience=0.0)
    placement = Placement(0, list, list)
    found = rounds.compare([alone, pool], "logprobs", 3, placement, arguments, table=Table(rounds.COLUMNS))[1]
    assert found.num_failed == 2
    assert found.round_tokens_per_second == [80.0, 80.0]
    assert found.round_gaps_ms == [(2.0, 8.0), (2.0, 8.0)]
    assert found.conditions == "1b, logprobs, 50 tokens per stream"
    assert [json.loads(json.dumps(kinds[0].fields)) for kinds in pool.asked] == [
        {},  # the warm-up
        *2 * [{"logprobs": True, "top_logprobs": 20}],
    ]
    printed = capsys.readouterr().out
    assert "| 2 |" in printed
    assert "<!-- mlx-pool: status 400: no such field -->" in printed
    assert not math.isnan(found.ratios[0])
