"""The kinds of requests that the streams of a contest make, by the name that `--mix` takes.

Owned by `bench.contest.rounds`, which deals them out to the streams in turn. Independent of servers: one that does not support a
field ignores it or fails the request, and a failure is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.load.protocols import CHAT, COMPLETIONS, Protocol

GREEDY = "greedy"
SAMPLING = "sampling"
TOP_LOGPROBS = 20
"""The most that OpenAI's chats allow."""


@dataclass(frozen=True, slots=True)
class RequestKind:
    """What a request asks for besides its prompt and a number of tokens.

    Attributes:
        fields: More fields; without a temperature it is greedy.
        protocol: Of the endpoint.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    protocol: Protocol = CHAT


_LONG_FORM = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 400}},
    "required": ["numbers"],
    "additionalProperties": False,
}
"""So long that no answer of a contest completes it."""

_FORMAT = {"type": "json_schema", "json_schema": {"name": "numbers", "strict": True, "schema": _LONG_FORM}}
_BIAS = {str(token_id): 1.5 for token_id in range(100, 140)}
_PENALTIES = {"frequency_penalty": 0.3, "presence_penalty": 0.3}
_LOGPROBS = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

MIXES: dict[str, tuple[RequestKind, ...]] = {
    GREEDY: (RequestKind(),),
    SAMPLING: (
        RequestKind(),
        RequestKind({"temperature": 0.8, "seed": 7}),
        RequestKind({"temperature": 0.7, **_PENALTIES}),
        RequestKind({"temperature": 1.0, "top_p": 0.9, "logprobs": True, "top_logprobs": 2}),
        RequestKind({"temperature": 0.0, "response_format": _FORMAT}),
    ),
    "logprobs": (RequestKind(_LOGPROBS),),
    "combined": (
        RequestKind(_LOGPROBS | {"response_format": _FORMAT}),
        RequestKind(_LOGPROBS | _PENALTIES | {"temperature": 0.8, "seed": 7, "logit_bias": _BIAS}),
        RequestKind({"logprobs": 5, "echo": True, **_PENALTIES}, COMPLETIONS),
        RequestKind(
            _LOGPROBS | _PENALTIES | {"temperature": 0.7, "response_format": _FORMAT, "logit_bias": _BIAS}
        ),
        RequestKind({"temperature": 0.9, "top_p": 0.9, "logprobs": 1, "logit_bias": _BIAS}, COMPLETIONS),
        RequestKind({"temperature": 1.0, "top_k": 40, "logprobs": True, "top_logprobs": 0}),
    ),
}
"""`sampling` gives four of five streams a seed, penalties, log-probabilities or a grammar; `logprobs` has every request ask for as
many log-probabilities as possible; in `combined` each request combines log-probabilities with other options, a third of them
in the legacy protocol."""


def kinds(mix: str, num_streams: int) -> list[RequestKind]:
    """The kind of each stream's request."""
    mixed = MIXES[mix]
    return [mixed[i % len(mixed)] for i in range(num_streams)]
