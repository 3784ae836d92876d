"""Parses the body of `POST /v1/responses` into a typed and checked value.

https://platform.openai.com/docs/api-reference/responses/create. What has no effect here is named in the request's `ignored`; what
would change the answer and is not supported is refused by name. A request that refers to stored responses is parsed in two steps:
`api.openai.responses.stored.completion` looks these up in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.generation.request import GenerationRequest
from api.http.json_body import BodyDecoder
from api.openai.fields import body as fields
from api.openai.fields.reasoning import Budget, ReasoningFields, ReasoningOptions, reasoning_of
from api.openai.fields.template_arguments import ReasoningEffort
from api.openai.responses import text_format
from api.openai.responses.history.conversation import Conversation, Item, as_items, kind_of
from api.openai.responses.options import ResponseOptions, changed
from api.openai.responses.text_format import TextConfig
from api.openai.responses.tools import ParsedTools, parse_tools
from api.openai.responses.typed import Ignored, missing
from common.errors import invalid
from common.protocol import ChatPrompt, SamplingParams

LOGPROBS, THOUGHTS = "message.output_text.logprobs", "reasoning.encrypted_content"
"""The values of `include` that have an effect."""

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
"""Within OpenAI's limits."""

Summary = Literal["auto", "concise", "detailed"]


class Reasoning(msgspec.Struct, frozen=True):
    """The field `reasoning`; `generate_summary` is the old name of `summary`. `max_tokens` and `enabled` are OpenRouter's."""

    effort: ReasoningEffort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None


class ResponsesBody(fields.Body, frozen=True, kw_only=True):
    """The fields of OpenAI's description, and those that local servers share; `max_tokens` is `max_output_tokens`."""

    input: Annotated[
        str | list[Any] | None,
        Meta(
            description="A text of the user, or items: messages, reasoning, calls and their outputs, as OpenAI describes them."
        ),
    ] = None
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_output_tokens: fields.MaxTokens | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    metadata: Metadata | None = None
    safety_identifier: Annotated[str, Meta(max_length=128)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


FORMAT_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""Those of chats. Here the format of the answer is `text.format`; to leave them out would change the answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **fields.NEUTRAL,
    **dict.fromkeys(FORMAT_FIELDS, ({"type": "text"},)),
    "conversation": (),
    "prompt": (),
    "moderation": (),
    "n": (1,),
}

ONLY_WITH = fields.ONLY_WITH
INEFFECTIVE = fields.INEFFECTIVE

MAX_TOKENS_FIELDS = ("max_output_tokens", "max_tokens", "n_predict")
"""OpenAI's, that of its chats, and llama.cpp's."""

_decoder = BodyDecoder(ResponsesBody)


class ResponseRequest(GenerationRequest, frozen=True, kw_only=True):
    """A request with the parts that are needed to look up what it refers to, and to store its response.

    Attributes:
        given: The body.
        items: Its input.
        earlier: The conversation of the response that it continues; empty until it is looked up.
        is_complete: Whether it refers to nothing that is still to be looked up; otherwise it has no prompt yet.
    """

    given: ResponsesBody
    items: list[Item]
    earlier: list[Item] = msgspec.field(default_factory=list)
    is_complete: bool = True


def parse(body: bytes) -> ResponseRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    given, names = _decoder.decode(body)
    ignored = Ignored(names)
    _check_format_fields(given)
    fields.check_neutral(given, NEUTRAL)
    fields.check_only_with(given, ONLY_WITH)
    fields.check_max_tokens(given, MAX_TOKENS_FIELDS)
    if given.background and given.store is False:
        raise invalid("`background` needs a stored response: `store` must not be false.", "store")
    items = as_items(given.input, "input")
    refers = [kind_of(item, f"input[{i}]") == "item_reference" for i, item in enumerate(items)]
    if given.previous_response_id is None and not any(refers):
        return build(given, items, ignored)
    return ResponseRequest(
        model=given.model,
        prompts=[],
        max_tokens=None,
        stop=[],
        top_logprobs=None,
        sampling=SamplingParams(),
        stream=bool(given.stream),
        ignored=ignored.names,
        given=given,
        items=items,
        is_complete=False,
    )


def _check_format_fields(given: ResponsesBody) -> None:
    """Raises:
    RequestError: 400, the format of the answer is in a field of chats.
    """
    for name in FORMAT_FIELDS:
        if getattr(given, name) not in (None, {"type": "text"}):
            raise invalid(
                f"`{name}` is a field of chats; here the format of the answer is `text.format`.",
                name,
                "unsupported_parameter",
            )


def build(
    given: ResponsesBody, items: list[Item], ignored: Ignored, earlier: list[Item] | None = None
) -> ResponseRequest:
    """A request whose items are all known.

    Args:
        earlier: The conversation that it continues.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    conversation = _conversation(given, items, earlier or [], ignored)
    tools = parse_tools(
        [(tool, f"tools[{i}]") for i, tool in enumerate(given.tools or [])] + conversation.extra_tools,
        given.tool_choice,
        is_parallel=given.parallel_tool_calls is not False,
        ignored=ignored,
    )
    _note_ignored(given, ignored)
    reasoning = given.reasoning or Reasoning()
    options = ReasoningOptions(
        effort=reasoning.effort, max_tokens=reasoning.max_tokens, enabled=reasoning.enabled
    )
    thoughts = reasoning_of(
        ReasoningFields(reasoning=options, chat_template_kwargs=given.chat_template_kwargs)
    )
    with_logprobs = LOGPROBS in (given.include or ()) or bool(given.top_logprobs)
    return ResponseRequest(
        model=given.model,
        prompts=[ChatPrompt(conversation.messages, template_arguments=thoughts.template_arguments)],
        max_tokens=fields.max_tokens(given, MAX_TOKENS_FIELDS, ignored.names),
        stop=fields.stops(given),
        includes_stop=bool(given.include_stop_str_in_output),
        top_logprobs=(given.top_logprobs or 0) if with_logprobs else None,
        sampling=fields.sampling(given, ignored.names),
        unset=fields.unset_sampling(given),
        stream=bool(given.stream),
        ignored=ignored.names,
        options=_options(given, reasoning, tools, with_logprobs=with_logprobs),
        grammar=text_format.grammar_of(given.text.format if given.text else None),
        grammar_field=text_format.SCHEMA_FIELD,
        reasoning_fields=thoughts.fields,
        max_reasoning_tokens=thoughts.max_tokens,
        tool_use=tools.use,
        is_background=bool(given.background),
        is_truncated=given.truncation == "auto",
        given=given,
        items=items,
        earlier=earlier or [],
    )


def _conversation(
    given: ResponsesBody, items: list[Item], earlier: list[Item], ignored: Ignored
) -> Conversation:
    conversation = Conversation(ignored)
    if given.instructions:  # those of earlier responses are not inherited
        conversation.add_instructions(given.instructions)
    for i, item in enumerate(earlier):
        conversation.add(item, f"previous_response_id.input[{i}]")
    for i, item in enumerate(items):
        conversation.add(item, f"input[{i}]")
    if not conversation.messages:
        if given.input is None:
            raise missing("input", "it must be a string or a list of items")
        raise invalid("`input` must have at least one message.", "input")
    return conversation


def _note_ignored(given: ResponsesBody, ignored: Ignored) -> None:
    """Name the values that have no effect here."""
    for name in fields.ineffective(given, INEFFECTIVE):
        ignored.add(name)
    for i, name in enumerate(given.include or ()):
        if name not in (LOGPROBS, THOUGHTS):
            ignored.add(f"include[{i}]")
    if fields.stream_options(given).continuous_usage_stats:  # only the last event of a response has its usage
        ignored.add("stream_options.continuous_usage_stats")
    if given.text is not None and given.text.verbosity in ("low", "high"):
        ignored.add("text.verbosity")


def _options(
    given: ResponsesBody, reasoning: Reasoning, tools: ParsedTools, *, with_logprobs: bool
) -> ResponseOptions:
    summary = reasoning.summary or reasoning.generate_summary
    text = given.text or TextConfig()
    echo = {
        "background": bool(given.background),
        "frequency_penalty": given.frequency_penalty or 0.0,
        "instructions": given.instructions,
        "max_output_tokens": fields.max_tokens(given, MAX_TOKENS_FIELDS, []),
        "max_tool_calls": given.max_tool_calls,
        "metadata": given.metadata or {},
        "parallel_tool_calls": given.parallel_tool_calls is not False,
        "presence_penalty": given.presence_penalty or 0.0,
        "previous_response_id": given.previous_response_id,
        "prompt_cache_key": given.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": summary},
        "safety_identifier": given.safety_identifier,
        "text": {"format": _echoed_format(text), "verbosity": text.verbosity or "medium"},
        "tool_choice": given.tool_choice or "auto",
        "tools": [_echoed_tool(tool) for tool in given.tools or []],
        "top_logprobs": given.top_logprobs or 0,
        "truncation": given.truncation or "disabled",
        "user": given.user if isinstance(given.user, str) else None,  # it may be any value, without effect
    }
    return ResponseOptions(
        echo=changed(echo),
        called={name: list(called) for name, called in tools.called.items()},
        with_logprobs=with_logprobs,
        is_summarized=summary is not None,
        is_encoded=THOUGHTS in (given.include or ()),
    )


def _echoed_format(text: TextConfig) -> dict[str, Any]:
    given = text.format
    if given is None or given.type != "json_schema":
        return {"type": "text" if given is None else given.type}
    return {
        "type": given.type,
        "description": given.description,
        "name": given.name or "response",
        "schema": given.schema,
        "strict": given.strict is not False,
    }


def _echoed_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI repeats it: functions have all of their fields."""
    if tool["type"] != "function" or "name" not in tool:
        return tool
    return {"description": None, "parameters": None, "strict": None} | tool
