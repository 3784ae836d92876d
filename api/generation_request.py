"""A request as the API understands it, whichever endpoint it came by: what goes to a worker and how it is answered."""

from __future__ import annotations

import msgspec

from common.protocol import ChatPrompt, SamplingParams, TextPrompt, TokenPrompt, ToolUse


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Parsed and checked, as far as it can be without the model.

    Attributes:
        model: As the client named it; None: the default.
        max_tokens: None: up to the context.
        top_logprobs: As in `common.protocol.GenerationJob`.
        include_usage: Whether a stream ends with the counts.
        service_tier: What the answer says, where the client asked.
        ignored: Fields that nobody knows.
        tool_use: As in `common.protocol.GenerationJob`.
        answers_functions: Whether a call is told in the deprecated form, as `function_call`.
    """

    model: str | None
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    max_tokens: int | None
    stop: list[str]
    top_logprobs: int | None
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    service_tier: str | None
    ignored: list[str]
    tool_use: ToolUse | None = None
    answers_functions: bool = False
