"""Parses the bodies of `/tokenize` and `/detokenize` into typed and checked values.

https://docs.vllm.ai/en/stable/serving/openai_compatible_server (Tokenizer API; vLLM 0.11). A body with `messages` is a chat
request: it has the fields of `/v1/chat/completions`, so that the tokens are those that the same request would have there.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.generation.request import Prompt
from api.http.json_body import BodyDecoder
from api.openai.chat import request as chat_request
from api.openai.fields import body as fields
from common.errors import invalid
from common.protocol import ChatPrompt, TextPrompt, ToolUse


class TokenizeTextBody(msgspec.Struct, frozen=True, kw_only=True):
    """Raw text, as for `/v1/completions`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(chat_request.ChatBody, frozen=True, kw_only=True):
    """A chat request, with vLLM's fields."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of the model's vocabulary."""

    tokens: list[Annotated[int, Meta(ge=0, le=2**31 - 1)]]
    model: str | None = None


class TokenizeInput(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed body of `/tokenize`; see `api.tokenizing.counting.Tokenizing.count`."""

    model: str | None
    prompt: Prompt
    tool_use: ToolUse | None = None
    grammar: str | None = None
    adds_special_tokens: bool = True
    returns_strings: bool = False
    ignored: list[str] = []


class _ChatFlags(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that a chat request does not have."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template: Any = None


_text = BodyDecoder(TokenizeTextBody)
_flags = BodyDecoder(_ChatFlags)
_tokens = BodyDecoder(DetokenizeBody)
_split = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_tokenize(body: bytes) -> TokenizeInput:
    """Parse and check a body of `/tokenize`.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    flags, _ = _flags.decode(body)
    names = _split.decode(body)
    if flags.chat_template is not None:
        raise fields.unsupported("chat_template")
    if "messages" in names:
        if "prompt" in names:
            raise invalid("Give either `prompt` or `messages`, not both.", "prompt")
        return _parse_chat(body, flags)
    text, ignored = _text.decode(body)
    return TokenizeInput(
        model=text.model,
        prompt=TextPrompt(text.prompt),
        adds_special_tokens=text.add_special_tokens is not False,
        returns_strings=bool(text.return_token_strs),
        ignored=ignored,
    )


def _parse_chat(body: bytes, flags: _ChatFlags) -> TokenizeInput:
    if flags.add_special_tokens:
        raise invalid(
            "`add_special_tokens` is not supported with `messages`: the chat template writes them.",
            "add_special_tokens",
        )
    if flags.add_generation_prompt and flags.continue_final_message:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            "continue_final_message",
        )
    own = _ChatFlags.__struct_fields__
    parts = {name: value for name, value in _split.decode(body).items() if name not in own}
    request = chat_request.parse(msgspec.json.encode(parts))
    prompt = request.prompts[0]
    assert isinstance(prompt, ChatPrompt)
    if flags.continue_final_message:
        prompt = msgspec.structs.replace(prompt, continue_final=True, opens_turn=False)
    elif flags.add_generation_prompt is not None:
        prompt = msgspec.structs.replace(prompt, opens_turn=flags.add_generation_prompt)
    return TokenizeInput(
        model=request.model,
        prompt=prompt,
        tool_use=request.tool_use,
        grammar=request.grammar,
        returns_strings=bool(flags.return_token_strs),
        ignored=request.ignored,
    )


def parse_detokenize(body: bytes) -> tuple[DetokenizeBody, list[str]]:
    """Parse a body of `/detokenize`; also returns the names of its unknown fields.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    return _tokens.decode(body)
