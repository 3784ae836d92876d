"""Prompts to token ids: chat templates, the role mapping of models without one, plain text, fill in the middle.

`Engine.encode` calls `tokenize` on the intake thread; its errors go to the client. `worker.text.templates` renders conversations.
Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from common.errors import RequestError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt
from worker.text import answer_format, fill_in_middle, truncation
from worker.text.answer_format import CallFormat, ModelFormat
from worker.text.templates import control_text
from worker.text.templates.renderer import ChatRenderer, Conversation
from worker.text.templates.support import Messages

# As mlx_lm.server 0.32, whose clients rely on it.
DEFAULT_ROLE_MAPPING: Mapping[str, str] = {
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


_FUNCTION_TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "thinking_mode")
"""The arguments of a template that mlx-lm implements as a function; a Jinja template accepts any."""


def max_prompt_chars(tokenizer: Any, context_length: int) -> int:
    """The length in characters above which no text fits the context: each token is at most the vocabulary's longest.

    In byte-level vocabularies a token's string has a character for each byte, so it covers at most as many characters of text.
    """
    return context_length * max(map(len, tokenizer.get_vocab()), default=1)


def tokenize(
    job: GenerationJob,
    tokenizer: Any,
    context_length: int,
    model_format: ModelFormat | None = None,
    max_chars: int | None = None,
) -> list[int]:
    """Tokenize a job's prompt.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or an object with the same methods.
        context_length: In tokens.
        model_format: What was detected about the model; None: nothing.
        max_chars: See `max_prompt_chars`: a longer text is refused before it is rendered or tokenized; None: no limit.

    Returns:
        Token ids, at least one and fewer than `context_length`.

    Raises:
        RequestError: 400; the template refuses the messages, the model cannot serve this kind of prompt, or it is too long.
    """

    def tokenize_whole(each: GenerationJob, max_tokens: int) -> list[int]:
        return _tokenize_whole(each, tokenizer, min(max_tokens, context_length), model_format, max_chars)

    if isinstance(job.prompt, ChatPrompt) and job.prompt.truncate_to is not None:
        return truncation.tokenize_newest(job, job.prompt.truncate_to, tokenize_whole)
    return tokenize_whole(job, context_length)


def _tokenize_whole(
    job: GenerationJob,
    tokenizer: Any,
    context_length: int,
    model_format: ModelFormat | None,
    max_chars: int | None,
) -> list[int]:
    """As `tokenize`, with nothing dropped."""
    limit = _TextLimit(context_length, max_chars)
    limit.check(job)
    match job.prompt:
        case ChatPrompt():
            param, token_ids = (
                "messages",
                _tokenize_chat(job, job.prompt, tokenizer, model_format or ModelFormat(), limit),
            )
        case TextPrompt(text, None):
            param, token_ids = "prompt", list(tokenizer.encode(text))
        case TextPrompt(text, suffix):
            param, token_ids = "suffix", _tokenize_fill_in_middle(text, str(suffix), tokenizer)
        case TokenPrompt(ids):
            param, token_ids = "prompt", list(ids)
    if not token_ids:
        # As in OpenAI's API: an empty prompt is the beginning of a new document.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise invalid("This model needs a prompt that is not empty.", param)
        token_ids = [start]
    if len(token_ids) >= context_length:
        raise _too_long(context_length, f"{len(token_ids)} tokens", param)
    return token_ids


class _TextLimit(NamedTuple):
    """Refuses what is too long for the context whatever its tokens are: tokenizing 10 MB takes many seconds."""

    context_length: int
    max_chars: int | None

    def check(self, job: GenerationJob) -> None:
        """Check the texts of a request before a template renders them.

        Raises:
            RequestError: 400; they are too long.
        """
        match job.prompt:
            case ChatPrompt(messages):
                self.check_length(sum(len(str(m.get("content") or "")) for m in messages), "messages")
            case TextPrompt(text, suffix):
                self.check_length(len(text) + len(suffix or ""), "prompt")

    def check_num_tokens(self, num_tokens: int, param: str) -> None:
        """Check the least number of tokens of a text."""
        if num_tokens >= self.context_length:
            raise _too_long(self.context_length, f"at least {num_tokens} tokens", param)

    def check_length(self, num_chars: int, param: str) -> None:
        """As `check`, for one text."""
        if self.max_chars is not None and num_chars > self.max_chars:
            raise _too_long(self.context_length, f"{num_chars} characters", param)


def _too_long(context_length: int, length: str, param: str) -> RequestError:
    return invalid(
        f"This model's maximum context length is {context_length} tokens. However, your prompt has {length}, "
        "which leaves no room for an answer.",
        param,
        "context_length_exceeded",
    )


def _tokenize_fill_in_middle(prefix: str, suffix: str, tokenizer: Any) -> list[int]:
    markers = fill_in_middle.find_markers(tokenizer)
    if markers is None:
        raise invalid("This model cannot fill a gap before a suffix.", "suffix")
    return fill_in_middle.build_prompt(prefix, suffix, tokenizer, markers)


def _tokenize_chat(
    job: GenerationJob, prompt: ChatPrompt, tokenizer: Any, model_format: ModelFormat, limit: _TextLimit
) -> list[int]:
    if prompt.continue_final:
        _check_final(prompt)
    call_format = answer_format.choose_call_format(job, model_format)
    in_template = answer_format.template_describes_tools(call_format, model_format)
    conversation = Conversation(
        prompt.messages,
        job.tool_use if call_format is not CallFormat.NONE else None,
        in_template,
        # The calls that a grammar enforces are described as text: those of the history should look the same.
        as_text=call_format is not CallFormat.NONE and not in_template,
        arguments=_template_arguments(prompt, tokenizer),
        continue_final=prompt.continue_final,
        opens_turn=prompt.opens_turn,
    )
    renderer = model_format.renderer or ChatRenderer(tokenizer, model_format.template)
    is_template = tokenizer.has_chat_template
    if is_template:
        text = renderer.render(conversation)
    else:
        text = _apply_role_mapping(renderer.plain_messages(conversation), prompt, limit)
    num_marks = control_text.num_marks(text)
    limit.check_length(len(text) - num_marks * len(control_text.MARK), "messages")
    limit.check_num_tokens(num_marks, "messages")
    if num_marks > control_text.MAX_MARKS:
        raise invalid(
            f"The messages have the text of more than {control_text.MAX_MARKS} control tokens.", "messages"
        )
    return control_text.encode(text, tokenizer, add_special_tokens=not is_template)  # a template writes them


def _check_final(prompt: ChatPrompt) -> None:
    final = prompt.messages[-1] if prompt.messages else {}
    if final.get("role") != "assistant" or final.get("tool_calls"):
        raise invalid(
            "Only an assistant message without calls can be continued, as the last message.", "messages"
        )


def _template_arguments(prompt: ChatPrompt, tokenizer: Any) -> dict[str, Any]:
    arguments = dict(prompt.template_arguments)
    if not arguments:
        return arguments
    if not isinstance(tokenizer.chat_template, str):
        return {name: arguments[name] for name in _FUNCTION_TEMPLATE_ARGUMENTS if name in arguments}
    # One option has two names: Qwen's and GLM's, and DeepSeek's and Kimi's.
    for name, other in (("enable_thinking", "thinking"), ("thinking", "enable_thinking")):
        if name in arguments:
            arguments.setdefault(other, arguments[name])
    return arguments


def _apply_role_mapping(messages: Messages, prompt: ChatPrompt, limit: _TextLimit) -> str:
    """Join the messages to one text, each with the prefix of its role; a base model can continue it."""
    mapping = prompt.role_mapping or DEFAULT_ROLE_MAPPING
    end = mapping.get("stop", "")
    prefixes = [mapping.get(m["role"], "") for m in messages]
    # Checked before they are repeated: prefixes of megabytes and thousands of messages would be gigabytes.
    limit.check_length(sum(map(len, prefixes)) + len(end) * len(messages), "messages")
    lines = [f"{prefix}{m.get('content') or ''}" for prefix, m in zip(prefixes, messages, strict=True)]
    if prompt.continue_final:
        return end.join(lines)
    return end.join([*lines, mapping.get("assistant", "") if prompt.opens_turn else ""]).rstrip()
