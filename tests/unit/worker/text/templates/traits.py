"""Chat templates of our own, each with a trait of real ones, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.protocol import ChatPrompt, GenerationJob, ToolUse
from worker.text import answer_format, prompts
from worker.text.answer_format import ModelFormat

MARKERS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]

CALLS = """{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}"""
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n"
BEGIN = """{% if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>
{% endif %}"""
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = BEGIN + "{% for m in messages %}" + TURN + "{% endfor %}" + END


def _guarded(condition: str) -> str:
    """A template that raises for messages that meet a condition."""
    check = f"{{% if {condition} %}}{{{{ raise_exception('refused') }}}}{{% endif %}}"
    return CHATML.replace("{% for m in messages %}", "{% for m in messages %}" + check)


def _silent(condition: str) -> str:
    """A template that drops messages that meet a condition."""
    return CHATML.replace(TURN, f"{{% if not ({condition}) %}}{TURN}{{% endif %}}")


TRAITS = {
    "complete": CHATML,
    "system first, else raises": _guarded("m.role == 'system' and not loop.first"),
    "system first, else lost": _silent("m.role == 'system' and not loop.first"),
    "no system, raises": _guarded("m.role == 'system'"),
    "no system, lost": _silent("m.role == 'system'"),
    "alternates": _guarded("(m.role == 'user') != (loop.index0 % 2 == 0)"),
    "alternates, nothing else": _guarded(
        "m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0)"
    ),
    "user first": _guarded("loop.first and m.role not in ('user', 'system')"),
    "needs a user": "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}"
    + CHATML,
    "no tools, raises": _guarded("m.role == 'tool' or m.tool_calls"),
    "no calls, lost": CHATML.replace(CALLS, ""),
    "no results, lost": _silent("m.role == 'tool'"),
    "one call": _guarded("m.tool_calls and m.tool_calls | length > 1"),
    "one call, others lost": CHATML.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    "text next to calls is lost": CHATML.replace(
        "{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    ),
    "arguments are objects": CHATML.replace(
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    ),
    "arguments are text": CHATML.replace(
        "{{ c.function.arguments | tojson }}", "{{ 'text: ' + c.function.arguments }}"
    ),
    "short ids": CHATML.replace(
        "{{ c.function.arguments",
        "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}{{ c.function.arguments",
    ),
    "no orphans": _guarded("m.role == 'tool' and (loop.first or loop.previtem.role in ('user', 'system'))"),
    "no user after a result": _guarded("m.role == 'user' and not loop.first and loop.previtem.role == 'tool'"),
    "contents are parts": CHATML.replace("{{ m.content }}", "{{ m.content[0].text }}"),
    "trims": CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
    "drops thoughts": CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
    "thoughts of the last turn": CHATML.replace(
        "{{ m.content }}",
        "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
    ),
    "thoughts or text": _guarded("m.tool_calls and m.reasoning_content and m.content"),
    "no empty assistant": _guarded("m.role == 'assistant' and not m.content and not m.tool_calls"),
    "iterates over tools": "{% for t in tools %}{% endfor %}" + CHATML,
    "needs descriptions": CHATML.replace("{{ t | tojson }}", "{{ '// ' + t.function.description + t.function.name }}"),
    "system at the end": "{% for m in messages if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' and m.role == 'user' %}"
    "{{ messages[0].content }}\n{% endif %}" + TURN + "{% endfor %}" + END,
}  # fmt: skip
"""By name. The last one is Mistral Nemo's: the system message stands in front of the last message, if that is a user's."""


class Model:
    """A byte-level tokenizer with one of the templates, and its detected format."""

    def __init__(self, template: str | Callable[..., str] | None, markers: list[str] = MARKERS) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=markers[-1])
        if not callable(template):
            fast.chat_template = template
        self.tokenizer: Any = TokenizerWrapper(fast, chat_template=template if callable(template) else None)
        self.format: ModelFormat = answer_format.detect_format(self.tokenizer)

    def ids(self, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[int]:
        job = GenerationJob(
            job_id="a",
            model="m",
            channel="c",
            prompt=ChatPrompt(messages, **options),
            tool_use=ToolUse(tools=tools) if tools else None,
        )
        return prompts.tokenize(job, self.tokenizer, 1_000_000, self.format)

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
        return str(self.tokenizer.decode(self.ids(messages, tools, **options)))

    def special_ids(self, ids: list[int]) -> list[int]:
        """Those of control tokens."""
        return [i for i in ids if i in self.tokenizer.added_tokens_decoder]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def call(number: int, arguments: Any, name: str = "lookup") -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}", "name": "lookup"}


def tool(name: str = "lookup", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}
