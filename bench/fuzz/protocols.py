"""The endpoints that are fuzzed: which components of `/openapi.json` describe their bodies, answers, events and errors.

Used by `bench.fuzz.judge`; the bodies themselves are in `bench.fuzz.bodies`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """An endpoint's components, by name.

    Attributes:
        request: One component, or several of which one must match.
        events: Of a stream's frames, one each; empty: it has no streams.
        stream: How a stream is framed: `data` with `[DONE]` at its end, or `events` with names.
        error: Of a refusal.
        names_param: Whether an error has a `param`.
    """

    request: tuple[str, ...]
    answer: str
    events: tuple[str, ...] = ()
    stream: str = "data"
    error: str = "ErrorBody"
    names_param: bool = True


_MESSAGE_EVENTS = (
    "AnthropicMessageStart",
    "AnthropicBlockStart",
    "AnthropicBlockDelta",
    "AnthropicBlockStop",
    "AnthropicMessageDelta",
    "AnthropicMessageStop",
    "AnthropicPing",
)

PROTOCOLS = {
    "ChatBody": Protocol(("ChatBody",), "ChatCompletion", ("ChatCompletionChunk",)),
    "CompletionBody": Protocol(("CompletionBody",), "Completion", ("CompletionChunk",)),
    "ResponsesBody": Protocol(("ResponsesBody",), "ResponseObject", ("ResponseEvent",), "events"),
    "MessagesBody": Protocol(
        ("AnthropicMessagesBody",),
        "AnthropicAnswerMessage",
        _MESSAGE_EVENTS,
        "events",
        "AnthropicErrorBody",
        names_param=False,
    ),
    "CountTokens": Protocol(
        ("AnthropicMessagesBody",), "AnthropicTokenCount", error="AnthropicErrorBody", names_param=False
    ),
    "Tokenize": Protocol(("TokenizeTextBody", "TokenizeChatBody"), "TokenizeResponse"),
    "Detokenize": Protocol(("DetokenizeBody",), "DetokenizeResponse"),
}
"""By `Body.type_name`."""
