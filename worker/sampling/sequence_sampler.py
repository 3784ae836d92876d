"""The sampling state of one sequence: its parameters, its position, what a grammar or penalties need of its history.

Created by `worker.mlx.generation`; `worker.sampling.sampler` samples a step of many on a CPU, `worker.mlx.sampling` on a GPU. Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from common.protocol import SamplingParams
from worker.sampling.arrays import FloatArray, IntArray

_GREEDY_BELOW_TEMPERATURE = 1e-5
"""Below it, dividing by the temperature overflows float32; sampling is greedy then, which is the limit."""

_MASK64 = (1 << 64) - 1

SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
SPLITMIX_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Matcher(Protocol):
    """The tokens with which one answer may continue; see `worker.sampling.grammar.GrammarMatcher`."""

    @property
    def is_open(self) -> bool:
        """Whether any token may come next, so that no mask is needed."""

    def advance(self, token_id: int) -> None:
        """Append a token of the answer.

        Raises:
            Exception: The token is not allowed.
        """

    def fill(self, words: np.ndarray[Any, Any]) -> None:
        """Write the mask of allowed tokens.

        Args:
            words: (num_words,) uint32; bit i % 32 of word i // 32 is 1 if token id i is allowed.

        Raises:
            Exception: No token is allowed.
        """


@dataclass(slots=True)
class SequenceSampler:
    """The sampling state of one sequence.

    Attributes:
        num_sampled: Tokens of the answer so far, other workers' included; the position of the next draw.
        counts: How often each token id is in the answer; kept only if a penalty needs it.
        matcher: Restricts the answer to a grammar; None: unrestricted.
        num_top_logprobs: How many of the most likely tokens are reported with each token; 0: only the token's own log-probability;
            None: none at all.
        error: What the matcher raised; the sequence cannot continue.
        biases: Token ids and amounts of `logit_bias`, once they were needed.
        is_greedy: Whether the most likely token is chosen.
        is_penalized: Whether tokens of the answer become less likely.
        depends_on_history: Whether the next token depends on previous ones other than through the model.
        has_adjustments: Whether its log-probabilities differ from the model's.
        is_filtered: Whether some tokens are excluded from a draw: the unlikely ones, or by XTC the most likely ones.
    """

    sampling: SamplingParams
    num_sampled: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    matcher: Matcher | None = None
    num_top_logprobs: int | None = None
    error: Exception | None = None
    biases: tuple[IntArray, FloatArray] | None = None

    # Computed once: read for each sequence in each step.
    is_greedy: bool = field(init=False)
    is_penalized: bool = field(init=False)
    depends_on_history: bool = field(init=False)
    has_adjustments: bool = field(init=False)
    is_filtered: bool = field(init=False)

    def __post_init__(self) -> None:
        s = self.sampling
        self.is_greedy = s.temperature < _GREEDY_BELOW_TEMPERATURE
        self.is_penalized = bool(s.presence_penalty or s.frequency_penalty)
        self.depends_on_history = self.is_penalized or self.matcher is not None
        self.has_adjustments = self.depends_on_history or bool(s.logit_bias) or s.min_tokens > 0
        self.is_filtered = s.top_p < 1.0 or s.top_k > 0 or s.min_p > 0.0 or s.xtc_probability > 0.0

    @property
    def bans_eos(self) -> bool:
        """Whether the next token may not end the answer."""
        return self.num_sampled < self.sampling.min_tokens

    @property
    def is_adjusted(self) -> bool:
        """Whether the next token's log-probabilities are changed; only if `has_adjustments`."""
        return (
            self.is_penalized
            or bool(self.sampling.logit_bias)
            or self.bans_eos
            or (self.matcher is not None and not self.matcher.is_open)
        )

    def observe(self, token_ids: Sequence[int]) -> None:
        """Record tokens of the answer, in order. An error of the matcher is kept in `error`."""
        if self.error is not None:
            return
        try:
            for token_id in token_ids:
                if self.is_penalized:
                    self.counts[token_id] = self.counts.get(token_id, 0) + 1
                if self.matcher is not None:
                    self.matcher.advance(token_id)
        except Exception as error:  # noqa: BLE001 (it concerns this sequence alone; the engine reports it)
            self.error = error

    def sparse_adjustments(self) -> list[tuple[IntArray, FloatArray]]:
        """What is added to the log-probabilities of single tokens, by biases and penalties.

        Penalties as in OpenAI's API: ``-count * frequency - (count > 0) * presence``, for tokens of the answer.

        Returns:
            Token ids and amounts, up to two pairs of arrays of equal length; a token may be in both.
        """
        s = self.sampling
        if s.logit_bias and self.biases is None:
            ids, amounts = np.array(list(s.logit_bias), np.int64), list(s.logit_bias.values())
            self.biases = ids, np.array(amounts, np.float32)
        adjustments = [] if self.biases is None else [self.biases]
        if self.counts:
            counts = np.array(list(self.counts.values()), np.float32)
            penalties = -counts * np.float32(s.frequency_penalty) - np.float32(s.presence_penalty)
            adjustments.append((np.array(list(self.counts), np.int64), penalties))
        return adjustments

    @property
    def random_states(self) -> tuple[int, int]:
        """States of two SplitMix64 generators (Steele, Lea and Flood, OOPSLA 2014) for the next draw: to choose the token, and to decide
        whether XTC applies. Each position adds `SPLITMIX_INCREMENT`.
        """
        seed, increment = self.sampling.seed & _MASK64, (self.num_sampled + 1) * SPLITMIX_INCREMENT
        return (seed + increment) & _MASK64, ((seed ^ 0x5851F42D4C957F2D) + increment) & _MASK64

    def draw_keys(self) -> tuple[int, int]:
        """64 random bits each for the next draw: to choose the token, and to decide whether XTC applies."""
        to_choose, to_exclude = self.random_states
        return _mix(to_choose), _mix(to_exclude)


def _mix(z: int) -> int:
    """64 random bits from a state of SplitMix64."""
    z = ((z ^ (z >> 30)) * SPLITMIX_FACTORS[0]) & _MASK64
    z = ((z ^ (z >> 27)) * SPLITMIX_FACTORS[1]) & _MASK64
    return z ^ (z >> 31)
