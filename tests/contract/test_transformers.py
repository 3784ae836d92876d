"""transformers 5.24 and tokenizers 0.23: what `worker/text/` and `common/logging.py` rely on, and mlx-lm's wrapper around them."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.protocol import RESERVED_TEMPLATE_ARGUMENTS

WORDS = ("<s>", "a", "b", "</s>", "[U]", "user")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}"
    "{% if add_generation_prompt %}a{% endif %}{{ wish }}"
)
MESSAGES = [{"role": "user", "content": "b"}]


@pytest.fixture
def fast() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=2
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def tokenizer(fast: PreTrainedTokenizerFast) -> Any:
    return TokenizerWrapper(fast)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged under `transformers`."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_template_arguments(tokenizer: Any) -> None:
    """A template receives messages, functions, and the client's `chat_template_kwargs`. Open worker/text/prompts.py."""
    tools = [{"type": "function", "function": {"name": "b"}}]
    text = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False, tools=tools, wish="!"
    )
    assert text == "user b b a!"


def test_template_gives_a_list_of_ids(tokenizer: Any) -> None:
    """Without `tokenize=False` a rendered template is a list of token ids, not a dict of tensors. Open worker/text/prompts.py, `_tokenize_chat`."""
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True) == [5, 2, 1]


def test_template_refuses(tokenizer: Any) -> None:
    """`raise_exception` in a template is a TemplateError, which becomes a 400 with its message. Open worker/text/prompts.py, `_tokenize_chat`."""
    with pytest.raises(jinja2.TemplateError, match="no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], add_generation_prompt=True)


def test_too_long_prompts_are_logged(fast: PreTrainedTokenizerFast, lines: list[logging.LogRecord]) -> None:
    """transformers warns of a prompt that is longer than the model's limit, at WARNING below the logger `transformers`.

    Such a prompt is refused with an error of our own, so `configure` silences the line by its level. Open common/logging.py.
    """
    logging.getLogger("transformers").setLevel(logging.WARNING)
    fast.encode("a a a")
    assert [(line.levelname, line.name) for line in lines] == [
        ("WARNING", "transformers.tokenization_utils_base")
    ]
    fast.deprecation_warnings.clear()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    fast.encode("a a a")
    assert len(lines) == 1


def test_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is imported, transformers sets its logger's level from TRANSFORMERS_VERBOSITY, whatever it was before.

    Otherwise a misleading line would be logged for each prompt that is too long. Open common/logging.py.
    """
    from transformers.utils import logging as own

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    assert own._get_default_logging_level() == logging.ERROR
    configured = inspect.getsource(own._configure_library_root_logger)
    assert "library_root_logger.setLevel(_get_default_logging_level())" in configured


def test_added_tokens(fast: PreTrainedTokenizerFast) -> None:
    """Grammars and the detokenizer find special tokens through these. Open worker/sampling/grammar.py, worker/text/detokenizer.py."""
    added = fast.added_tokens_decoder
    assert {i: str(token) for i, token in added.items()} == {0: "<s>", 3: "</s>"}
    assert all(token.special for token in added.values())
    assert fast.all_special_ids == [0, 3]
    assert fast.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert (fast.bos_token_id, fast.eos_token_id) == (0, 3)
    assert fast.decode([1, 2]) == "a b"


def test_encoding(fast: PreTrainedTokenizerFast) -> None:
    """Text is encoded with and without special tokens. Open worker/text/prompts.py, worker/text/fill_in_middle.py."""
    assert list(fast.encode("a b")) == [1, 2]
    assert fast.encode("a", add_special_tokens=False) == [1]
    assert getattr(fast, "add_bos_token", False) in (True, False)


def test_backend_tokenizer(fast: PreTrainedTokenizerFast) -> None:
    """A grammar's own tokenizer is a copy of the backend, changed as JSON. Open worker/sampling/grammar.py, `_plain`."""
    written = json.loads(fast.backend_tokenizer.to_str())
    assert {"truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"} <= written.keys()
    assert written["added_tokens"][0].keys() >= {"content", "special"}
    plain = Tokenizer.from_str(json.dumps(written))
    plain.encode_special_tokens = True
    assert plain.encode("a b", add_special_tokens=False).ids == [1, 2]


def test_wrapper_hands_on(tokenizer: Any, fast: PreTrainedTokenizerFast) -> None:
    """mlx-lm's wrapper delegates other attributes to the tokenizer, which is `_tokenizer`. Open worker/sampling/grammar.py, `_Vocabulary`."""
    assert tokenizer._tokenizer is fast
    assert tokenizer.backend_tokenizer is not None
    assert tokenizer.model_max_length == 2
    assert tokenizer.chat_template == TEMPLATE
    assert getattr(tokenizer, "default_chat_template", None) is None


def test_wrapper_settings(tokenizer: Any) -> None:
    """The template, and whether there is one, can be set from outside. Open worker/mlx/model.py, `_use_default_chat_template`."""
    tokenizer.chat_template = "{{ wish }}"
    tokenizer.has_chat_template = True
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, wish="!") == "!"
    assert tokenizer.has_chat_template is True


def test_wrapper_facts(tokenizer: Any) -> None:
    """The format of answers is detected from these. Open worker/text/answer_format.py, `detect_format`; worker/sampling/thinking.py."""
    assert tokenizer.eos_token_ids == {3}
    assert tokenizer.has_thinking is False
    assert tokenizer.has_tool_calling is False
    assert (tokenizer.think_start, tokenizer.think_end) == (None, None)
    assert (tokenizer.think_start_tokens, tokenizer.think_end_tokens) == (None, None)
    assert (tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser) == (None, None, None)
    assert list(tokenizer.structural_markers) == []
    assert tokenizer.response_transitions == {}
    assert tokenizer.response_initial_state is None


def test_wrapper_of_a_thinking_model(fast: PreTrainedTokenizerFast) -> None:
    """mlx-lm detects thinking in the vocabulary, and calls through its parsers. Open worker/text/answer_format.py, `detect_format`."""
    fast.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    wrapped: Any = TokenizerWrapper(
        fast, tool_call_start="<tool_call>", tool_call_end="</tool_call>", tool_parser=str
    )
    assert (wrapped.has_thinking, wrapped.think_start, wrapped.think_end) == (True, "<think>", "</think>")
    assert list(wrapped.think_end_tokens) == [7]
    assert (wrapped.has_tool_calling, wrapped.tool_parser) == (True, str)


def test_transitions_of_a_response() -> None:
    """States and markers have the shape of `make_text_state_machine`: (marker, next state) by state. Open worker/text/answer_format.py."""
    from mlx_lm.generate import make_text_state_machine

    source = inspect.getsource(make_text_state_machine)
    for name in ("has_thinking", "structural_markers", "response_transitions", "has_tool_calling"):
        assert f"tokenizer.{name}" in source, name
    for state in ("normal", "reasoning", "tool"):
        assert f'"{state}"' in source, state


def test_maps_of_detokenizers(fast: PreTrainedTokenizerFast, tokenizer: Any) -> None:
    """A table of bytes is built from `tokenmap`, which has text for byte-level vocabularies and bytes for sentencepiece's. Open worker/text/detokenizer.py."""
    byte_level = BPEStreamingDetokenizer(fast)
    assert byte_level.tokenmap[:4] == ["<s>", "a", "b", "</s>"]
    pieces = SPMStreamingDetokenizer(fast, trim_space=True)
    assert pieces.tokenmap[1] == b"a"
    assert pieces.trim_space is True
    assert not hasattr(tokenizer.detokenizer, "tokenmap"), (
        "others have none, and their tokens are decoded repeatedly"
    )
    assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False)) == "a"
    assert max(tokenizer.get_vocab().values()) + 1 == len(tokenizer.get_vocab())


def test_code_of_a_model_is_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `trust_remote_code=None` transformers would ask on standard input; with False it refuses. Open worker/mlx/model.py, `load_model`."""
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    with pytest.raises(ValueError, match="trust_remote_code"):
        resolve_trust_remote_code(False, "m", has_local_code=False, has_remote_code=True)


def test_template_arguments_are_not_options() -> None:
    """A request can set no parameter of `apply_chat_template` by an argument of the template.

    Open api/openai/fields/template_arguments.py.
    """
    for method in (PreTrainedTokenizerFast.apply_chat_template, TokenizerWrapper.apply_chat_template):
        named = [
            name
            for name, parameter in inspect.signature(method).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        assert "self" in named
        assert set(named) <= RESERVED_TEMPLATE_ARGUMENTS
