"""Prompts to token ids: the model's chat template, the role mapping of models without one, plain text.

Called by the engine when it takes a job; raises what the client is told. Knows nothing of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import RequestError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt
from worker import filling

# The mapping of mlx_lm.server 0.32, which its clients rely on.
DEFAULT_ROLE_MAPPING: Mapping[str, str] = {
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


def tokenize(job: GenerationJob, tokenizer: Any, context_length: int) -> list[int]:
    """The job's prompt as token ids, at least one and fewer than the context.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`, or what looks like it.

    Raises:
        RequestError: 400; the template refuses the messages, or the prompt is too long.
    """
    match job.prompt:
        case ChatPrompt():
            param, token_ids = "messages", _chat(job.prompt, tokenizer)
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
    found = filling.marks(tokenizer)
    if found is None:
        raise invalid("This model cannot fill a gap before a suffix.", "suffix")
    return filling.token_ids(text, suffix, tokenizer, found)


def _chat(prompt: ChatPrompt, tokenizer: Any) -> list[int]:
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(_mapped(prompt)))
    try:
        return list(tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True))
    except RequestError:
        raise
    except Exception as error:
        # Templates refuse what they do not know (jinja2's TemplateError, KeyError, TypeError, ...): the messages' fault.
        raise invalid(
            f"The model's chat template refuses these messages: {_one_line(error)}", "messages"
        ) from error


def _mapped(prompt: ChatPrompt) -> str:
    """The messages as one text, by prefix of role; what a base model can go on from."""
    mapping = prompt.role_mapping or DEFAULT_ROLE_MAPPING
    end = mapping.get("stop", "")
    lines = [f"{mapping.get(m['role'], '')}{m.get('content') or ''}{end}" for m in prompt.messages]
    return ("".join(lines) + mapping.get("assistant", "")).rstrip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
