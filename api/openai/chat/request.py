"""Parses the body of `POST /v1/chat/completions` into a typed and checked value.

https://platform.openai.com/docs/api-reference/chat/create. A field is honored, refused by name, or ignored and named; docs/parameters.md
has the decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from api.generation.request import GenerationRequest
from api.http.json_body import BodyDecoder
from api.openai.answer import AnswerOptions
from api.openai.chat import messages as chat_messages
from api.openai.chat import tools as tool_request
from api.openai.chat.messages import Message
from api.openai.fields import body as fields
from api.openai.fields import response_format
from api.openai.fields.functions import FunctionDefinition
from api.openai.fields.reasoning import ReasoningFields, reasoning_of
from common.errors import invalid
from common.protocol import ChatPrompt

_CALLS_ONLY_OF_ASSISTANTS = Meta(
    extra_json_schema={
        "anyOf": [
            {"properties": {"role": {"const": "assistant"}}},
            {
                "properties": {
                    "tool_calls": {"anyOf": [{"type": "null"}, {"maxItems": 0}]},
                    "function_call": {"type": "null"},
                }
            },
        ]
    }
)
"""What `api.openai.chat.messages` checks, as far as a schema can express it."""


class ChatBody(ReasoningFields, frozen=True, kw_only=True):
    """The fields of OpenAI's description, `role_mapping` of mlx_lm.server, and those that vLLM, llama.cpp and others have in addition.

    `metadata` has no effect here, so any object is accepted.
    """

    messages: Annotated[list[Annotated[Message, _CALLS_ONLY_OF_ASSISTANTS]], Meta(min_length=1)]
    role_mapping: dict[str, str] | None = None
    max_completion_tokens: fields.MaxTokens | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    logprobs: bool | Literal[0, 1] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[tool_request.Tool] | None = None
    tool_choice: str | tool_request.ToolChoice | None = None
    functions: list[FunctionDefinition] | None = None
    function_call: str | tool_request.NamedFunction | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    store: Any = None
    parallel_tool_calls: bool | None = None
    moderation: Any = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **fields.NEUTRAL,
    "modalities": ([], ["text"]),
    "web_search_options": (),
    "moderation": (),
}

INEFFECTIVE: Mapping[str, tuple[Any, ...]] = {
    **fields.INEFFECTIVE,
    "audio": (),  # of a modality that is refused
    "prediction": (),
    "verbosity": ("medium",),
    "store": (False,),
}

ONLY_WITH: Mapping[str, str] = {**fields.ONLY_WITH, "top_logprobs": "logprobs"}

MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "n_predict")
"""OpenAI's newer field, its older one, and llama.cpp's."""

_decoder = BodyDecoder(ChatBody)


def parse(body: bytes) -> GenerationRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    chat, ignored = _decoder.decode(body)
    fields.check_neutral(chat, NEUTRAL)
    fields.check_max_tokens(chat, MAX_TOKENS_FIELDS)
    fields.check_only_with(chat, ONLY_WITH)
    ignored += fields.ineffective(chat, INEFFECTIVE)
    answer_grammar = response_format.grammar_of(chat, ignored)
    reasoning = reasoning_of(chat)
    stream_options = fields.stream_options(chat)
    tools = tool_request.tool_use(chat, ignored)
    return GenerationRequest(
        model=chat.model,
        prompts=[
            ChatPrompt(
                chat_messages.plain(chat.messages),
                chat.role_mapping,
                reasoning.template_arguments,
                continue_final=_continues_final(chat),
            )
        ],
        n=chat.n or 1,
        best_of=chat.n or 1,
        max_tokens=fields.max_tokens(chat, MAX_TOKENS_FIELDS, ignored),
        stop=fields.stops(chat),
        includes_stop=bool(chat.include_stop_str_in_output),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        sampling=fields.sampling(chat, ignored),
        unset=fields.unset_sampling(chat),
        stream=bool(chat.stream),
        options=AnswerOptions(
            include_usage=bool(stream_options.include_usage),
            continuous_usage=bool(stream_options.continuous_usage_stats),
            service_tier="default" if chat.service_tier is not None else None,
            with_logprobs=bool(chat.logprobs),
            as_function_call=tool_request.uses_functions(chat),
            hides_reasoning=reasoning.is_hidden,
            custom_tools=[] if tools is None else tool_request.custom_names(chat),
        ),
        journals_started=bool(stream_options.continuous_usage_stats),
        grammar=None if answer_grammar is None else answer_grammar.text,
        grammar_field=None if answer_grammar is None else answer_grammar.field,
        tool_use=tools,
        reasoning_fields=reasoning.fields,
        max_reasoning_tokens=reasoning.max_tokens,
        ignored=ignored,
    )


def _continues_final(chat: ChatBody) -> bool:
    """Whether the answer continues the last message. It is a new turn unless the client asks: also after an assistant's message.

    Raises:
        RequestError: 400; the last message cannot be continued, or the client asks for a new turn too.
    """
    last = chat.messages[-1]
    asking = [
        name
        for name, asks in (
            ("continue_final_message", chat.continue_final_message),
            ("add_generation_prompt", chat.add_generation_prompt is False),
        )
        if asks
    ]
    if chat.continue_final_message and chat.add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.",
            "continue_final_message",
        )
    if asking and (last.role != "assistant" or last.tool_calls or last.function_call):
        raise invalid(
            f"`{asking[0]}` asks to continue the last message, which must be the assistant's and have no calls.",
            asking[0],
        )
    return bool(asking) or (last.role == "assistant" and bool(last.prefix or last.partial))
