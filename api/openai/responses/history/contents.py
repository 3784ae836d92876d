"""The text of messages' contents and of calls' results.

Used by `api.openai.responses.history.conversation`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.openai.responses.history.item_types import Part
from api.openai.responses.typed import Ignored, missing, name_unknown_keys, typed
from common.errors import invalid

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_OTHER_PARTS = {"input_image": "an image", "input_file": "a file", "input_audio": "audio"}


def output_text(output: Any, path: str, ignored: Ignored) -> str:
    """The text of a call's result.

    What is not text is named, and replaced by a note for the model: to refuse a tool's result with an image would end an agent's
    session for good, since its history is sent again with every turn.
    """
    if output is None or isinstance(output, (str, list)):
        return text_of(output, path, ignored, may_lack_parts=True)
    return msgspec.json.encode(output).decode()  # not OpenAI's, but clear: an object as it is


def text_of(
    content: Any, path: str, ignored: Ignored, *, joint: str = "", may_lack_parts: bool = False
) -> str:
    """The text of a content; null is an empty one.

    Args:
        joint: Between its parts.
        may_lack_parts: Whether parts that are not text are replaced by a note.

    Raises:
        RequestError: 400, in `param` the part that is wrong or not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise invalid(f"`{path}` must be a string or a list of parts.", path)
    texts = []
    for i, given in enumerate(content):
        at = f"{path}[{i}]"
        if isinstance(given, str):
            texts.append(given)
            continue
        part = typed(given, Part, at, ignored)
        if part.type in _OTHER_PARTS and may_lack_parts:
            ignored.add(at)
            texts.append(f"[{_OTHER_PARTS[part.type]}, which this model cannot read]")
            continue
        texts.append(_part_text(part, at))
    return joint.join(texts)


def name_unknown_keys_of_parts(content: list[Any] | None, path: str, ignored: Ignored) -> None:
    """Name the unknown keys in a content that is not used, and so not checked."""
    for i, part in enumerate(content or ()):
        if isinstance(part, dict):
            name_unknown_keys(part, Part.__struct_encode_fields__, f"{path}[{i}]", ignored)


def _part_text(part: Part, path: str) -> str:
    if part.type in _TEXT_PARTS:
        if part.text is None:
            raise missing(f"{path}.text", "it must be a string")
        return part.text
    if part.type == "refusal":
        return part.refusal or ""
    if part.type in _OTHER_PARTS:
        raise invalid(
            f"Only text is supported, not content parts of type `{part.type}`.",
            f"{path}.type",
            "unsupported_content",
        )
    raise invalid(f"`{path}.type` must be `input_text`, `output_text` or `refusal`.", f"{path}.type")
