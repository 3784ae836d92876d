"""Parses the body of `POST /v1/messages` into a typed and checked value, and that of `/v1/messages/count_tokens`.

https://platform.claude.com/docs/en/api/messages, version 2023-06-01, and the fields of the betas of the SDK (anthropic 2.14). What
has no effect here is named in the response; what would change the answer is refused by name.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.anthropic.errors import THREAD_UNSUPPORTED
from api.anthropic.messages import thinking as thinking_field
from api.anthropic.messages.blocks import Block, Skipped
from api.anthropic.messages.conversation import Message, conversation
from api.anthropic.messages.rendering import MessageOptions
from api.anthropic.messages.thinking import Effort, Thinking
from api.anthropic.messages.tools import Tool, ToolChoice, tool_use
from api.generation.request import GenerationRequest, unset_sampling
from api.http.json_body import BodyDecoder
from common.errors import invalid
from common.protocol import ChatPrompt, SamplingParams
from common.schema import grammar, limits

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1_000
"""Of a stop sequence: a worker compares it with the end of the text after each token."""

MAX_TOKENS = 2**31 - 1

StopSequence = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Metadata(msgspec.Struct, frozen=True):
    """Without effect."""

    user_id: str | None = None


class JsonFormat(msgspec.Struct, frozen=True):
    """A schema that the answer's text has to match."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`effort` is an argument of the template."""

    effort: Effort | None = None
    format: JsonFormat | None = None


class PromptBody(msgspec.Struct, frozen=True, kw_only=True):
    """What determines the prompt; None is also an explicit null, which means the default."""

    model: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=100_000)]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    mcp_servers: list[dict[str, Any]] | None = None
    thread: dict[str, Any] | None = None
    compaction: dict[str, Any] | None = None
    cache_control: Any = None
    anthropic_version: str | None = None
    anthropic_beta: list[str] | None = None
    betas: list[str] | None = None


class MessagesBody(PromptBody, frozen=True, kw_only=True):
    """The fields of Anthropic's description, and those of other local servers from `seed` on."""

    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    stream: bool | None = None
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

_decoder = BodyDecoder(MessagesBody)


def parse(body: bytes) -> GenerationRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    given, unknown = _decoder.decode(body)
    skipped = Skipped()
    _check_state(given)
    said = conversation(given.system, given.messages)
    tools = tool_use(given.tools, given.tool_choice, skipped)
    if given.mcp_servers:
        if tools is None:
            raise invalid("`mcp_servers` is not supported: this server calls no others.", "mcp_servers")
        skipped.add("mcp_servers")
    answer_format = _format(given)
    if answer_format is not None and said.is_continued:
        raise invalid(
            "A last message of the assistant's, which the answer continues, cannot be combined with a JSON schema for the complete answer.",
            "messages",
        )
    sampling = _given_sampling(given)
    effort = given.output_config.effort if given.output_config is not None else None
    return GenerationRequest(
        model=given.model,
        prompts=[
            ChatPrompt(
                said.messages,
                template_arguments=thinking_field.template_arguments(given.thinking, effort),
                continue_final=said.is_continued,
            )
        ],
        max_tokens=given.max_tokens,
        stop=given.stop_sequences or [],
        top_logprobs=None,
        sampling=SamplingParams(seed=secrets.randbits(63) if given.seed is None else given.seed, **sampling),
        unset=unset_sampling(sampling),
        stream=bool(given.stream),
        ignored=[*unknown, *said.skipped, *skipped.paths],
        options=MessageOptions(max_tokens=given.max_tokens, thinking=thinking_field.display(given.thinking)),
        grammar=None if answer_format is None else grammar.for_json_schema(answer_format.schema),
        tool_use=tools,
        reasoning_fields=["thinking"] if thinking_field.is_enabled(given.thinking) else [],
        max_reasoning_tokens=thinking_field.max_tokens(given.thinking),
        journals_started=True,
    )


def _check_state(given: PromptBody) -> None:
    """Refuse fields that refer to what Anthropic's servers keep: without it, the prompt would be another one.

    Raises:
        RequestError: 400.
    """
    for name, code in (("thread", THREAD_UNSUPPORTED), ("compaction", None)):
        if getattr(given, name) is not None:
            raise invalid(f"`{name}` is not supported: no conversations are stored here.", name, code)


def _format(given: PromptBody) -> JsonFormat | None:
    """The format of the answer; `output_format` is the older name.

    Raises:
        RequestError: 400; both are given and differ, or the schema is too large.
    """
    newer = given.output_config.format if given.output_config is not None else None
    chosen = newer or given.output_format
    if chosen is None:
        return None
    path = "output_config.format" if newer is not None else "output_format"
    if newer is not None and given.output_format not in (None, newer):
        raise invalid("`output_config.format` and `output_format` differ; set only one of them.", path)
    if complaint := limits.size_refusal(chosen.schema):
        raise invalid(f"`{path}.schema` is not supported: {complaint}", f"{path}.schema")
    return chosen


def _given_sampling(given: MessagesBody) -> dict[str, Any]:
    """The fields of `SamplingParams` that the client set, but the seed."""
    values = {name: value for name in _SAMPLING_FIELDS if (value := getattr(given, name)) is not None}
    if given.top_k is not None:
        values["top_k"] = max(0, given.top_k)
    if given.top_p == 0:  # in the limit, only the most likely token remains
        values |= {"top_p": 1.0, "temperature": 0.0}
    return values
