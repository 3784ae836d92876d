"""A request as the API understands it, whichever endpoint it came by: what goes to workers and how it is answered.

Each choice is a job of its own: it is taken, batched, taken over and counted as any other, by whichever worker is free.
"""

from __future__ import annotations

import hashlib
import time

import msgspec

from common import names
from common.errors import invalid
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenPrompt, ToolUse

Prompt = ChatPrompt | TextPrompt | TokenPrompt

MAX_CHOICES = 1024
"""Of one request: prompts times choices."""

MAX_COPIES_BYTES = 64 * 2**20
"""Each choice's job has its prompt; so much of one request may lie in Redis."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Parsed and checked, as far as it can be without the model.

    Attributes:
        model: As the client named it; None: the default.
        prompts: At least one; only completions have several.
        n: Choices a prompt.
        best_of: How many are generated for those; at least `n`.
        max_tokens: None: up to the context.
        top_logprobs: As in `common.protocol.GenerationJob`.
        include_usage: Whether a stream ends with the counts.
        service_tier: What the answer says, where the client asked.
        grammar: As in `common.protocol.GenerationJob`, and the next two.
        ignored: Fields that nobody knows.
        answers_functions: Whether a call is told in the deprecated form, as `function_call`.
    """

    model: str | None
    prompts: list[Prompt]
    max_tokens: int | None
    stop: list[str]
    top_logprobs: int | None
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    service_tier: str | None
    ignored: list[str]
    n: int = 1
    best_of: int = 1
    grammar: str | None = None
    tool_use: ToolUse | None = None
    echo: bool = False
    answers_functions: bool = False

    @property
    def num_jobs(self) -> int:
        """One for each choice, those too that are generated to choose the best from."""
        return len(self.prompts) * self.best_of

    def jobs(self, model_id: str, channel: str, tokens: list[int]) -> list[GenerationJob]:
        """The choices of the first prompt, then those of the next.

        Args:
            tokens: What a job of each prompt is estimated to take.
        """
        top_logprobs = self.top_logprobs
        if self.best_of > self.n and top_logprobs is None:
            top_logprobs = 0  # the best one is found by them
        submitted_at = time.time()
        return [
            GenerationJob(
                job_id=names.new_job_id(num_tokens),
                model=model_id,
                channel=channel,
                prompt=prompt,
                max_tokens=self.max_tokens,
                stop=self.stop,
                top_logprobs=top_logprobs,
                sampling=_for_choice(self.sampling, choice),
                submitted_at=submitted_at,
                grammar=self.grammar,
                tool_use=self.tool_use,
                echo=self.echo,
            )
            for prompt, num_tokens in zip(self.prompts, tokens, strict=True)
            for choice in range(self.best_of)
        ]


def check_size(request: GenerationRequest, num_bytes: int) -> None:
    """Bound what one request becomes.

    Raises:
        RequestError: 400.
    """
    param = "prompt" if len(request.prompts) > request.best_of else "n"
    if request.num_jobs > MAX_CHOICES:
        raise invalid(
            f"The request asks for {request.num_jobs} choices; at most {MAX_CHOICES} are allowed.", param
        )
    copies_bytes = num_bytes * request.best_of
    if request.best_of > 1 and copies_bytes > MAX_COPIES_BYTES:
        raise invalid(
            f"So many choices of so long a prompt are too much for one request: {copies_bytes} bytes.", param
        )


def _for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The first choice is the one that a request for one would get; the others draw with seeds of their own."""
    if choice == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed} {choice}".encode(), digest_size=8).digest()
    return msgspec.structs.replace(sampling, seed=int.from_bytes(digest) >> 1)
