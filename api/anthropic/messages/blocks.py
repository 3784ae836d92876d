"""The content blocks of messages: their type, and the text that a model gets of them.

Used by `api.anthropic.messages.conversation`. One struct has the fields of all kinds of blocks, so that a block of a kind that is not known here
can be named instead of refused. Must not know roles or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from api.http.unknown_keys import MAX_REPORTED_KEYS
from common.errors import RequestError, invalid


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a document or an image consists of; only text is supported."""

    type: str
    data: str | None = None
    content: str | list[Block] | None = None
    media_type: str | None = None
    url: str | None = None
    file_id: str | None = None


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One content block. `cache_control` never changes the prompt: prefixes are cached without being marked.

    `citations` belongs to text that a model wrote, or asks for citations of a document, of which there are none here. `caller`
    and `toolset_name` come back with calls and have no effect.
    """

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | str | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | dict[str, Any] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    source: str | Source | None = None
    title: str | None = None
    context: str | None = None
    tool_name: str | None = None
    citations: Any = None
    cache_control: Any = None
    caller: Any = None
    toolset_name: str | None = None


Content = str | list[Block] | None

SEPARATOR = "\n"
"""Between blocks that are texts of their own, such as a document and a question."""

_MEDIA = ("image", "document", "video", "audio")


@dataclass(slots=True)
class Skipped:
    """The paths of blocks that are not served, for the report of what was ignored."""

    paths: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        """Note one; a body may have hundreds of thousands."""
        if len(self.paths) < MAX_REPORTED_KEYS:
            self.paths.append(path)


def text_of(content: Content, path: str, skipped: Skipped, *, has_media_notes: bool = False) -> str:
    """The text of blocks that are not messages of their own.

    Args:
        has_media_notes: Whether an image becomes a note that it was left out, in place of a refusal: a tool's result is sent again
            with every later request, so that a refusal would end the session.

    Raises:
        RequestError: 400; a block has no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = [
        block_text(block, f"{path}[{i}]", skipped, has_media_notes=has_media_notes)
        for i, block in enumerate(content)
    ]
    return SEPARATOR.join(text for text in texts if text)


def block_text(block: Block, path: str, skipped: Skipped, *, has_media_notes: bool = False) -> str:
    """The text of one block; empty if it is skipped.

    Raises:
        RequestError: As `text_of`.
    """
    match block.type:
        case "text":
            return required(block.text, f"{path}.text")
        case "search_result":
            _report_citations(block, path, skipped)
            content = block.content if not isinstance(block.content, dict) else None
            source = block.source if isinstance(block.source, str) else None
            found = _texts(content, f"{path}.content", skipped)
            return SEPARATOR.join(filter(None, (block.title, source, found)))
        case "tool_reference":
            return required(block.tool_name, f"{path}.tool_name")
        case "document" if (text := _document_text(block, path, skipped)) is not None:
            return text
        case kind if kind in _MEDIA:
            if not has_media_notes:
                raise _no_text(block, path)
            skipped.add(path)
            return f"[{kind} left out: this model reads only text]"
        case _:
            skipped.add(path)
            return ""


def _document_text(block: Block, path: str, skipped: Skipped) -> str | None:
    """The text of a document; None if its source is not text."""
    source = block.source
    _report_citations(block, path, skipped)
    if not isinstance(source, Source):
        raise invalid(f"`{path}.source` must be an object.", f"{path}.source")
    if source.type == "text":
        text = required(source.data, f"{path}.source.data")
    elif source.type == "content":
        text = _texts(source.content, f"{path}.source.content", skipped)
    else:
        return None
    return SEPARATOR.join(filter(None, (block.title, block.context, text)))


def _texts(content: Content, path: str, skipped: Skipped) -> str:
    """The text of what a document or a search result consists of: text blocks, and none that contain others."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, block in enumerate(content):
        if block.type in _MEDIA:
            raise _no_text(block, f"{path}[{i}]")
        if block.type == "text":
            texts.append(required(block.text, f"{path}[{i}].text"))
        else:
            skipped.add(f"{path}[{i}]")
    return SEPARATOR.join(texts)


def _report_citations(block: Block, path: str, skipped: Skipped) -> None:
    if isinstance(block.citations, dict) and block.citations.get("enabled"):
        skipped.add(f"{path}.citations")


def _no_text(block: Block, path: str) -> RequestError:
    kind = block.type
    if kind == "document" and isinstance(block.source, Source):
        kind = f"document of a source of type `{block.source.type[:64]}`"
        path = f"{path}.source.type"
    else:
        path = f"{path}.type"
    return invalid(
        f"`{path}`: only text is supported, not a block of type {kind}.", path, "unsupported_content"
    )


def required(value: str | None, path: str) -> str:
    """A field that its kind of block must have.

    Raises:
        RequestError: 400; it has none.
    """
    if value is None:
        raise invalid(f"`{path}` must be a string.", path)
    return value
