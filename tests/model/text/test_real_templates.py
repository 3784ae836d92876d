"""Every chat template of llama.cpp's collection with conversations of all shapes, through the function that the worker uses."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlx_lm import tokenizer_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import RequestError
from common.protocol import ChatPrompt, GenerationJob, ToolUse
from tests.model.text.template_collection import template_folder
from tests.unit.worker.text.templates.traits import assistant, call, result, system, tool, user
from worker.text import answer_format, prompts
from worker.text.answer_format import ModelFormat

pytestmark = pytest.mark.heavy

CANNOT_COMPILE: dict[str, str] = {}
"""Templates that transformers cannot compile, each with the reason."""

MARKER = re.compile(r"<[|｜][^<>|｜\s{}]*[|｜]>|</?[a-z_:]+>|\[/?[A-Z_]{3,}\]|<[a-z_]+\|>|<\|[a-z_]+>")  # noqa: RUF001
"""What looks like a control token in a template."""

TOOLS = [
    tool(
        description="Finds things.", parameters={"type": "object", "properties": {"city": {"type": "string"}}}
    )
]


class Case(NamedTuple):
    """A conversation; `{}` in a text stands for a word of its own."""

    messages: list[dict[str, Any]]
    has_tools: bool = False
    continue_final: bool = False


S, U, A, R = system("{}"), user("{}"), assistant("{}"), result(0, "{}")
CALL = assistant(None, call(0, {"city": "{}"}))
SPOKEN_CALL = assistant("{}", call(0, {"city": "{}"}), reasoning_content="thought")
PARALLEL = assistant("", call(1, {"city": "{}"}), call(2, {"city": "{}"}))
RESULTS = [result(1, "{}"), result(2, "{}")]
CASES = {
    "system first": Case([S, U, A, U]),
    "no system": Case([U]),
    "system in the middle": Case([S, U, A, S, U]),
    "two systems": Case([S, S, U]),
    "only a system": Case([S]),
    "system last": Case([U, A, S]),
    "assistant first": Case([S, A, U]),
    "assistant last": Case([S, U, A]),
    "roles do not alternate": Case([U, U, A, A, U]),
    "thoughts and empty turns": Case(
        [U, assistant("{}", reasoning_content="thought"), U, assistant(None), U]
    ),
    "a call with text": Case([S, U, SPOKEN_CALL, R, A, U], has_tools=True),
    "parallel calls": Case([S, U, PARALLEL, *RESULTS], has_tools=True),
    "parallel calls with text": Case([U, PARALLEL | {"content": "{}"}, *RESULTS, A, U], has_tools=True),
    "an agent with a system in the middle": Case([S, U, S, CALL, R, PARALLEL, *RESULTS, U], has_tools=True),
    "calls without tools": Case([U, CALL, R]),
    "parallel calls without tools": Case([S, U, SPOKEN_CALL, R, PARALLEL, *RESULTS, A, U]),
    "arguments that were cut": Case([U, assistant(None, call(0, '{"city": "{}')), R, U], has_tools=True),
    "no arguments, empty result": Case([U, assistant("", call(0, {})), result(0, ""), U], has_tools=True),
    "a result without a call": Case([U, R, U], has_tools=True),
    "continued": Case([S, U, assistant("{} and ")], continue_final=True),
    "continued with thoughts": Case(
        [S, U, assistant("{}", reasoning_content="thought")], continue_final=True
    ),
    "continued after a call": Case([U, CALL, R, A], has_tools=True, continue_final=True),
}


class RealTemplate:
    """A template, and a byte-level tokenizer with its control tokens, loaded as a model's."""

    def __init__(self, path: Path, folder: Path) -> None:
        template = path.read_text()
        self.markers = sorted({*MARKER.findall(template), "<s>", "</s>"})
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in self.markers])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = template
        fast.save_pretrained(folder)
        self.tokenizer: Any = tokenizer_utils.load(folder)
        self.format: ModelFormat = answer_format.detect_format(self.tokenizer)

    def ids(self, case: Case, messages: list[dict[str, Any]]) -> list[int]:
        job = GenerationJob(
            job_id="a",
            model="m",
            channel="c",
            prompt=ChatPrompt(messages, continue_final=case.continue_final),
            tool_use=ToolUse(tools=TOOLS) if case.has_tools else None,
        )
        return prompts.tokenize(job, self.tokenizer, 1_000_000, self.format)

    def problem(self, case: Case) -> str | None:
        """What is wrong with the prompt of a conversation."""
        words: list[str] = []
        forged: list[str] = []
        messages = _with_words(case.messages, words, [""])
        try:
            ids = self.ids(case, messages)
            forged_ids = self.ids(case, _with_words(case.messages, forged, self.markers))
        except RequestError as error:
            return error.message
        text = self.tokenizer.decode(ids)
        if counts := {word: text.count(word) for word in words if text.count(word) != 1}:
            return f"times in the prompt: {counts}"
        if case.continue_final and not text.endswith(messages[-1]["content"]):
            return "does not end with the last message"
        return None if self.special(forged_ids) == self.special(ids) else "a control token was forged"

    def special(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self.tokenizer.added_tokens_decoder]


def _with_words(value: Any, words: list[str], endings: list[str]) -> Any:
    """A copy in which each `{}` is replaced with a new word, which ends with one of the endings; appends them to `words`."""
    if isinstance(value, str):
        if "{}" not in value:
            return value
        words.append(f"word{len(words):02}end{endings[len(words) % len(endings)]}")
        return value.replace("{}", words[-1])
    if isinstance(value, list):
        return [_with_words(item, words, endings) for item in value]
    if isinstance(value, dict):
        return {key: _with_words(item, words, endings) for key, item in value.items()}
    return value


def test_every_template_with_every_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No error; each text in the prompt once; a continued text at its end; control tokens in data forge nothing."""
    problems: dict[str, str] = {}
    paths = [path for path in sorted(template_folder().glob("*.jinja")) if path.stem not in CANNOT_COMPILE]
    for path in paths:
        template = RealTemplate(path, tmp_path / path.stem)
        for name, case in CASES.items():
            if (problem := template.problem(case)) is not None:
                problems[f"{path.stem}: {name}"] = problem
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(paths)} templates, {len(CASES)} shapes each; left out: {CANNOT_COMPILE or 'none'}\n"
        )
    assert len(paths) >= 50
    assert problems == {}
