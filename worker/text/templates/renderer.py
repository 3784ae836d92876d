"""Renders a conversation with a model's chat template: adapted to it, and with control tokens in data marked as text.

One `ChatRenderer` per model, made by `answer_format.detect_format` and used by `worker.text.prompts` on the intake thread. Independent of jobs
and of MLX.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import msgspec

from common.errors import RequestError, invalid
from common.protocol import ToolUse
from worker.text.templates import control_text, tool_messages
from worker.text.templates.adaptations import normalize_tools
from worker.text.templates.alterations import find_alterations
from worker.text.templates.control_text import ControlText
from worker.text.templates.planner import Planner
from worker.text.templates.support import (
    PROBE_TOOL,
    Messages,
    TemplateSupport,
    ToolMessageStyle,
    with_content_parts,
    with_short_ids,
)

_END = f"z{secrets.token_hex(12)}z"
"""Follows the text that the answer continues, while the template renders it."""

_MAX_ATTEMPTS = 50
"""Attempts to render a conversation that the template refuses because of its texts."""

_Tools = list[dict[str, Any]]


class _EndNotFoundError(Exception):
    """The template does not render the end of the last message."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered.

    Attributes:
        messages: As in `common.protocol.ChatPrompt`.
        tool_use: Functions that the prompt describes; None: none.
        in_template: Whether the template describes them; otherwise our instructions do.
        as_text: Whether earlier calls and results become text even if the template supports them.
        arguments: Further arguments of the template.
        continue_final: Whether the text ends with that of the last message.
        opens_turn: Whether the text ends with the beginning of the assistant's turn; without effect if it continues the last message.
    """

    messages: Messages
    tool_use: ToolUse | None = None
    in_template: bool = False
    as_text: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    opens_turn: bool = True


class ChatRenderer:
    """See the module.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        support: What was detected about its template.
    """

    def __init__(self, tokenizer: Any, support: TemplateSupport) -> None:
        self._tokenizer = tokenizer
        self._support = support
        self._planner = Planner(support.tool_message_style)
        names = ("think_start", "think_end", "tool_call_start", "tool_call_end")
        start, end, *others = (getattr(tokenizer, name, None) for name in names)
        markers = [start, end, *others, *getattr(tokenizer, "structural_markers", ()), *tool_messages.MARKERS]
        tokens = control_text.find_control_tokens(tokenizer, markers, support.literal_text)
        alterations = find_alterations(tokenizer, tokens, support.literal_text)
        self._control_text = ControlText(tokens, (start, end) if start and end else None, alterations)

    def plain_messages(self, conversation: Conversation) -> Messages:
        """Messages without calls and results, for a model without a template; their texts contain marks."""
        messages = self._prepare(conversation).messages
        return tool_messages.render_as_text(messages)

    def render(self, conversation: Conversation) -> str:
        """Render a conversation; the text contains marks, see `control_text.encode`.

        Raises:
            RequestError: 400; the template refuses the messages, or the last message cannot be continued.
        """
        prepared = self._prepare(conversation)
        adaptation = self._planner.choose(
            prepared.messages,
            self._situation(prepared),
            lambda messages: self._render(messages, prepared, [PROBE_TOOL]),
            words=[PROBE_TOOL["function"]["name"]] if prepared.in_template else [],
            as_text=conversation.as_text,
        )
        tools = prepared.tool_use.tools if prepared.tool_use is not None else []
        try:
            return self._render(self._planner.apply(adaptation, prepared.messages), prepared, tools)
        except Exception as error:
            for messages, changed, changed_tools in islice(self._attempts(prepared, tools), _MAX_ATTEMPTS):
                try:
                    return self._render(messages, changed, changed_tools)
                except Exception:  # noqa: BLE001, S112 (the first error is reported)
                    continue
            raise _refusal(error) from error

    def _prepare(self, conversation: Conversation) -> Conversation:
        """Complete the messages, mark control tokens in data, and describe the functions if the template does not."""
        messages = [_complete(message) for message in conversation.messages]
        if self._support.tool_message_style is ToolMessageStyle.SHORT_IDS:
            messages = with_short_ids(messages)
        use, arguments = conversation.tool_use, conversation.arguments
        mark = self._control_text.mark
        if self._control_text.is_in(messages, use and use.tools, arguments):
            messages = [self._control_text.mark_message(message) for message in messages]
            arguments = {name: mark(value) for name, value in arguments.items()}
            use = use and msgspec.structs.replace(use, tools=mark(use.tools), function=mark(use.function))
        if use is not None and not conversation.in_template:
            messages = tool_messages.add_tool_instructions(messages, use)
        return replace(conversation, messages=messages, tool_use=use, arguments=arguments)

    def _situation(self, prepared: Conversation) -> tuple[Any, ...]:
        # Hashed: the planner caches it, and clients choose the arguments.
        text = repr(sorted(prepared.arguments.items()))
        arguments = hashlib.blake2b(text.encode(errors="surrogatepass")).digest()
        return prepared.in_template, prepared.continue_final, prepared.opens_turn, arguments

    def _attempts(
        self, prepared: Conversation, tools: _Tools
    ) -> Iterator[tuple[Messages, Conversation, _Tools]]:
        """Other renderings to try if the template raises because of the texts, not because of the conversation's shape."""

        def adapted() -> Iterator[Messages]:  # not a list: each may have a copy of all texts
            return (new for _, new in self._planner.adapted(prepared.messages, as_text=prepared.as_text))

        # DeepSeek V3.2 refuses a last message of the assistant without reasoning, unless reasoning is off.
        names = (
            ("enable_thinking", "thinking")
            if isinstance(self._tokenizer.chat_template, str)
            else ("enable_thinking",)
        )
        off = dict.fromkeys(names, False)
        without_thinking = replace(prepared, arguments=prepared.arguments | off)
        yield next(adapted()), without_thinking, tools
        for changed_tools in [tools, normalize_tools(tools)] if prepared.in_template else [tools]:
            for messages in adapted():
                yield messages, prepared, changed_tools

    def _render(self, messages: Messages, prepared: Conversation, tools: _Tools) -> str:
        """Render adapted messages.

        Raises:
            Exception: Any; templates raise jinja2's TemplateError, KeyError, TypeError and others.
        """
        arguments = prepared.arguments | {"tools": tools} if prepared.in_template else prepared.arguments
        if prepared.continue_final:
            return self._render_continued(messages, arguments)
        return self._apply(messages, arguments, add_generation_prompt=prepared.opens_turn)

    def _render_continued(self, messages: Messages, arguments: dict[str, Any]) -> str:
        if messages[-1]["role"] != "assistant":  # the adaptation has left out an empty message
            messages = [*messages, {"role": "assistant", "content": ""}]
        final = messages[-1]
        text = str(final.get("content") or "")
        marked = [*messages[:-1], final | {"content": text + _END}]
        # A template may render the last message of a training text only.
        for add_generation_prompt in (False, True):
            rendered = self._apply(marked, arguments, add_generation_prompt=add_generation_prompt)
            before, end, _ = rendered.rpartition(_END)
            if end:
                # A template that trims has removed the white space at the beginning.
                trimmed = text.lstrip()
                if trimmed and not before.endswith(text) and before.endswith(trimmed):
                    before = before.removesuffix(trimmed) + text
                return before
        raise _EndNotFoundError

    def _apply(self, messages: Messages, arguments: dict[str, Any], *, add_generation_prompt: bool) -> str:
        if self._support.needs_content_parts:
            messages = with_content_parts(messages)
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **{**self._support.default_arguments, **arguments},
            )
        )


def _complete(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a string: null is an empty text, and parts are joined."""
    content = message.get("content")
    if isinstance(content, str):
        return message
    texts = [part if isinstance(part, str) else str(part.get("text") or "") for part in content or []]
    return message | {"content": "".join(texts)}


def _refusal(error: Exception) -> RequestError:
    if isinstance(error, _EndNotFoundError):
        return invalid(
            "The last message cannot be continued: the model's chat template does not render the end of its text.",
            "messages",
        )
    text = control_text.remove_marks(" ".join(str(error).split()))[:300] or type(error).__name__
    return invalid(f"The model's chat template refuses these messages: {text}", "messages")
