"""Parses the body of `POST /v1/chat/completions` into a typed and checked value.

https://platform.openai.com/docs/api-reference/chat/create. Unsupported parameters are refused by name, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from api.generation.request import GenerationRequest, unset
from api.http.json_body import BodyDecoder
from api.openai import request_fields as fields
from api.openai.answer import AnswerOptions
from api.openai.chat import messages as chat_messages
from api.openai.chat import response_format
from api.openai.chat import tools as tool_request
from api.openai.chat.messages import Message
from api.openai.chat.template_arguments import ReasoningEffort, template_arguments
from common.errors import invalid
from common.protocol import ChatPrompt

_HAS_CONTENT = Meta(
    extra_json_schema={
        "oneOf": [
            {
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "tool", "function"]},
                    "content": {"type": ["string", "array"], "minItems": 1},
                    "tool_calls": {"anyOf": [{"type": "null"}, {"maxItems": 0}]},
                    "function_call": {"type": "null"},
                },
                "required": ["content"],
                "allOf": [
                    {
                        "if": {"properties": {"role": {"const": "tool"}}},
                        "then": {
                            "properties": {"tool_call_id": {"type": "string"}},
                            "required": ["tool_call_id"],
                        },
                    },
                    {
                        "if": {"properties": {"role": {"const": "function"}}},
                        "then": {"properties": {"name": {"type": "string"}}, "required": ["name"]},
                    },
                ],
            },
            {
                "properties": {"role": {"const": "assistant"}},
                "anyOf": [
                    {
                        "properties": {"content": {"type": ["string", "array"], "minItems": 1}},
                        "required": ["content"],
                    },
                    {
                        "properties": {"tool_calls": {"type": "array", "minItems": 1}},
                        "required": ["tool_calls"],
                    },
                    {"properties": {"function_call": {"type": "object"}}, "required": ["function_call"]},
                    {"properties": {"refusal": {"type": "string"}}, "required": ["refusal"]},
                ],
            },
        ]
    }
)
"""What `api.openai.chat.messages` checks, as far as a schema can express it."""


Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
"""Within OpenAI's limits; metadata has no effect here."""


class ChatBody(fields.Body, frozen=True, kw_only=True):
    """The fields of OpenAI's description, and `role_mapping` and `chat_template_kwargs` of mlx_lm.server."""

    messages: Annotated[list[Annotated[Message, _HAS_CONTENT]], Meta(min_length=1)]
    role_mapping: dict[str, str] | None = None
    max_completion_tokens: fields.TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: response_format.Wanted | None = None
    tools: list[tool_request.Tool] | None = None
    tool_choice: str | tool_request.ToolChoice | None = None
    functions: list[tool_request.FunctionDefinition] | None = None
    function_call: str | tool_request.NamedFunction | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    verbosity: str | None = None
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    moderation: Any = None
    metadata: Metadata | None = None
    safety_identifier: Annotated[str, Meta(max_length=64)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **fields.NEUTRAL,
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "verbosity": ("medium",),
    "store": (False,),
}

ONLY_WITH: Mapping[str, str] = {**fields.ONLY_WITH, "top_logprobs": "logprobs"}

_decoder = BodyDecoder(ChatBody)


def parse(body: bytes) -> GenerationRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    chat, ignored = _decoder.decode(body)
    fields.check_neutral(chat, NEUTRAL)
    fields.check_only_with(chat, ONLY_WITH)
    return GenerationRequest(
        model=chat.model,
        prompts=[
            ChatPrompt(
                chat_messages.plain(chat.messages),
                chat.role_mapping,
                template_arguments(chat.reasoning_effort, chat.chat_template_kwargs),
            )
        ],
        n=chat.n or 1,
        best_of=chat.n or 1,
        max_tokens=_max_tokens(chat),
        stop=fields.stops(chat),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        sampling=fields.sampling(chat),
        unset=unset(chat),
        stream=bool(chat.stream),
        ignored=ignored,
        options=AnswerOptions(
            include_usage=chat.stream_options is not None and bool(chat.stream_options.include_usage),
            service_tier="default" if chat.service_tier is not None else None,
            with_logprobs=bool(chat.logprobs),
            as_function_call=tool_request.uses_functions(chat),
        ),
        grammar=response_format.grammar_of(chat.response_format),
        tool_use=tool_request.tool_use(chat),
    )


def _max_tokens(chat: ChatBody) -> int | None:
    both = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(both) > 1:
        raise invalid(
            "`max_tokens` and `max_completion_tokens` differ; set only one of them.",
            "max_completion_tokens",
        )
    return both.pop() if both else None
