"""The messages of a request, in the form that chat templates expect.

A message of Anthropic's may hold several things, which templates have as messages of their own: each tool result becomes one. Their
order is kept. Used by `api.anthropic.messages.request`. Must not know models.
https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from api.anthropic.messages import signature
from api.anthropic.messages.blocks import SEPARATOR, Block, Content, Skipped, block_text, required, text_of
from common.errors import invalid

_BILLING_HEADER = "x-anthropic-billing-header:"
"""A block of Claude Code's that is not for the model: it differs from request to request, so no prefix would be cached."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message. Claude Code sends the role `system` in the middle of a conversation; the server does not reorder."""

    role: Literal["user", "assistant", "system"]
    content: Content = None


class Conversation(msgspec.Struct, frozen=True):
    """Messages for a chat template.

    Attributes:
        is_continued: Whether the answer continues the last message (prefill).
        skipped: The paths of blocks that are not served.
    """

    messages: list[dict[str, Any]]
    is_continued: bool
    skipped: list[str]


def conversation(system: Content, messages: list[Message]) -> Conversation:
    """Convert a request's messages.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    skipped = Skipped()
    converted: list[dict[str, Any]] = []
    instructions = _instructions(system, skipped)
    if instructions:
        converted.append({"role": "system", "content": instructions})
    called: dict[str, str] = {}  # function names by call id
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if message.role == "assistant":
            converted += _assistant(message.content, path, called, skipped)
        else:
            converted += _said(message, path, called, skipped)
    is_continued = bool(messages) and messages[-1].role == "assistant" and _prepare_prefill(converted)
    if not converted:
        raise invalid("`messages` must have a message with content that can be served.", "messages")
    return Conversation(converted, is_continued, skipped.paths)


def _instructions(system: Content, skipped: Skipped) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    texts = []
    for i, block in enumerate(system):
        if (block.text or "").startswith(_BILLING_HEADER):
            skipped.add(f"system[{i}]")
        else:
            texts.append(block_text(block, f"system[{i}]", skipped))
    return (SEPARATOR * 2).join(filter(None, texts))


def _said(message: Message, path: str, called: dict[str, str], skipped: Skipped) -> list[dict[str, Any]]:
    """A user's or system message: what is between tool results is joined to one text."""
    if message.content is None or isinstance(message.content, str):
        return [{"role": message.role, "content": message.content or ""}]
    said: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(message.content):
        where = f"{path}.content[{i}]"
        if block.type == "tool_use":
            raise invalid(f"`{where}`: only an assistant message can have a `tool_use`.", f"{where}.type")
        if block.type != "tool_result":
            texts.append(block_text(block, where, skipped))
            continue
        said += _text_message(message.role, texts)
        texts = []
        said.append(_result(block, where, called, skipped))
    said += _text_message(message.role, texts)
    return said or [{"role": message.role, "content": ""}]


def _text_message(role: str, texts: list[str]) -> list[dict[str, Any]]:
    text = SEPARATOR.join(filter(None, texts))
    return [{"role": role, "content": text}] if text else []


def _result(block: Block, path: str, called: dict[str, str], skipped: Skipped) -> dict[str, Any]:
    """A tool's result, with the tool's name, which some templates need."""
    call_id = required(block.tool_use_id, f"{path}.tool_use_id")
    content = block.content if not isinstance(block.content, dict) else None
    text = text_of(content, f"{path}.content", skipped, has_media_notes=True)
    if block.is_error and not text.lower().startswith("error"):
        text = f"Error: {text}" if text else "Error"
    result = {"role": "tool", "content": text, "tool_call_id": call_id}
    return result | {"name": called[call_id]} if call_id in called else result


def _assistant(content: Content, path: str, called: dict[str, str], skipped: Skipped) -> list[dict[str, Any]]:
    """A model's earlier answer: thoughts, text and calls; no message if all of its blocks are skipped."""
    if content is None or isinstance(content, str):
        return [{"role": "assistant", "content": content or ""}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        where = f"{path}.content[{i}]"
        match block.type:
            case "tool_result":
                raise invalid(f"`{where}`: only a user message can have a `tool_result`.", f"{where}.type")
            case "tool_use":
                calls.append(_call(block, where, called))
            case "thinking":
                thoughts.append(block.thinking or signature.thoughts(block.signature or ""))
            case _:
                texts.append(block_text(block, where, skipped))
    text = "".join(texts)  # a model's text may be cut into blocks in the middle of a sentence
    if content and not (text or thoughts or calls) and not any(block.type == "text" for block in content):
        return []
    said: dict[str, Any] = {"role": "assistant", "content": text}
    if any(thoughts):
        said["reasoning_content"] = SEPARATOR.join(filter(None, thoughts))
    if calls:
        said["tool_calls"] = calls
    return [said]


def _call(block: Block, path: str, called: dict[str, str]) -> dict[str, Any]:
    call_id, name = required(block.id, f"{path}.id"), required(block.name, f"{path}.name")
    called[call_id] = name
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": _arguments(block.input)},
    }


def _arguments(given: dict[str, Any] | str | None) -> dict[str, Any] | str:
    """The input as an object; some clients send it as JSON text. Other text is kept: any answer can be sent back."""
    if not isinstance(given, str):
        return given or {}
    try:
        return msgspec.json.decode(given, type=dict[str, Any]) if given.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return given


def _prepare_prefill(converted: list[dict[str, Any]]) -> bool:
    """Prepare a last message of the assistant's to be continued; returns whether there is anything to continue.

    White space at its end is removed: a token begins with its space, and Anthropic refuses it. An empty message is dropped.
    """
    last = converted[-1] if converted else None
    if last is None or last["role"] != "assistant" or "tool_calls" in last:
        return False
    last["content"] = last["content"].rstrip()
    if last["content"]:
        return True
    if "reasoning_content" not in last:
        converted.pop()
    return False
