"""Prompts to token ids: the model's chat template, the role mapping of models without one, plain text.

Called by the engine when it takes a job; raises what the client is told. What a template does not know of functions,
`worker.text.tool_messages` says in words. Knows nothing of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import RequestError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt
from worker.text import answer_format, chat_template, fill_in_middle, tool_messages
from worker.text.answer_format import CallForm, ModelFormat
from worker.text.chat_template import Messages

# The mapping of mlx_lm.server 0.32, which its clients rely on.
DEFAULT_ROLE_MAPPING: Mapping[str, str] = {
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


_FUNCTION_TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "thinking_mode")
"""Where mlx-lm brings the template as a function, it takes these; a Jinja template takes all."""


def tokenize(
    job: GenerationJob, tokenizer: Any, context_length: int, model: ModelFormat | None = None
) -> list[int]:
    """The job's prompt as token ids, at least one and fewer than the context.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or what looks like it.
        model: What is known of the model's template; None: nothing.

    Raises:
        RequestError: 400; the template refuses the messages, or the prompt is too long.
    """
    match job.prompt:
        case ChatPrompt():
            param, token_ids = "messages", _chat(job, job.prompt, tokenizer, model or ModelFormat())
        case TextPrompt(text, None):
            param, token_ids = "prompt", list(tokenizer.encode(text))
        case TextPrompt(text, suffix):
            param, token_ids = "suffix", _filling(text, str(suffix), tokenizer)
        case TokenPrompt(ids):
            param, token_ids = "prompt", list(ids)
    if not token_ids:
        # As OpenAI: an empty prompt is the beginning of a new document.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise invalid("This model needs a prompt that is not empty.", param)
        token_ids = [start]
    if len(token_ids) >= context_length:
        raise invalid(
            f"This model's maximum context length is {context_length} tokens. However, your prompt has "
            f"{len(token_ids)} tokens, which leaves no room for an answer.",
            param,
            "context_length_exceeded",
        )
    return token_ids


def _filling(text: str, suffix: str, tokenizer: Any) -> list[int]:
    found = fill_in_middle.find_markers(tokenizer)
    if found is None:
        raise invalid("This model cannot fill a gap before a suffix.", "suffix")
    return fill_in_middle.build_prompt(text, suffix, tokenizer, found)


def _chat(job: GenerationJob, prompt: ChatPrompt, tokenizer: Any, model: ModelFormat) -> list[int]:
    form = answer_format.choose_call_form(job, model)
    is_told_by_template = answer_format.is_told_by_template(form, model)
    messages = _messages(job, prompt, form, model)
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(_mapped(messages, prompt.role_mapping)))
    arguments = _template_arguments(prompt, tokenizer)
    if is_told_by_template and job.tool_use is not None:
        arguments["tools"] = job.tool_use.tools
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **arguments))
    except RequestError:
        raise
    except Exception as error:
        # Templates refuse what they do not know (jinja2's TemplateError, KeyError, TypeError, ...): the messages' fault.
        raise invalid(
            f"The model's chat template refuses these messages: {_one_line(error)}", "messages"
        ) from error


def _messages(job: GenerationJob, prompt: ChatPrompt, form: CallForm, model: ModelFormat) -> Messages:
    """The messages as the model can read them.

    1. No function is given, none was called: as they are.
    2. The template knows calls, and none but its own format is asked for: calls and results as it likes them.
    3. Else they are put into words; functions too, if there are any, and the template is not to tell of them.
    """
    is_told_by_template = answer_format.is_told_by_template(form, model)
    messages, style = prompt.messages, model.template.calls
    if any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        if style is not None and (form is CallForm.NONE or is_told_by_template):
            messages = chat_template.convert_tool_messages(messages, style)
        else:
            messages = tool_messages.render_as_text(messages)
    if form is CallForm.NONE or is_told_by_template or job.tool_use is None:
        return messages
    return tool_messages.add_tool_instructions(
        messages, job.tool_use, renders_system=model.template.renders_system
    )


def _template_arguments(prompt: ChatPrompt, tokenizer: Any) -> dict[str, Any]:
    given = dict(prompt.template_arguments)
    if not given:
        return given
    if not isinstance(tokenizer.chat_template, str):
        return {name: given[name] for name in _FUNCTION_TEMPLATE_ARGUMENTS if name in given}
    # The same wish has two names: Qwen's and GLM's, and DeepSeek's and Kimi's.
    for name, other in (("enable_thinking", "thinking"), ("thinking", "enable_thinking")):
        if name in given:
            given.setdefault(other, given[name])
    return given


def _mapped(messages: Messages, role_mapping: Mapping[str, str] | None) -> str:
    """The messages as one text, by prefix of role; what a base model can go on from."""
    mapping = role_mapping or DEFAULT_ROLE_MAPPING
    end = mapping.get("stop", "")
    lines = [f"{mapping.get(m['role'], '')}{m.get('content') or ''}{end}" for m in messages]
    return ("".join(lines) + mapping.get("assistant", "")).rstrip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
