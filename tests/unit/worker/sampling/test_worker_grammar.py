"""Grammar masks on a small vocabulary: what they allow, where an answer may end, and that no state is a dead end."""

from __future__ import annotations

import functools
import json
import threading
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.errors import RequestError
from common.protocol import ToolUse
from common.schema import grammar
from tests.grammar_cases import SCHEMAS, Walk, advance_all, allowed_ids
from worker.sampling.grammar import GrammarCompiler, GrammarError, GrammarMatcher, num_words

SPECIAL = ["<end>", "<pad>", "<tool_call>", "</tool_call>"]
END, PAD, CALL = 0, 1, 2
TEXT = [
    '{"name": "Ann", "arguments": {"city": "Paris", "kind": "cat", "a": [1, 2, 3], "b": null, "c": true}}',
    '[{"value": 12, "children": []}, {"x": -1.5e3, "color": "red", "ok": false}]',
    "2024-05-17T12:00:00Z is a day on which one could have said: “naïve” 日本語 😀",
]
VOCAB_SIZE = 700
"""The model's: larger than the tokenizer's, and not a multiple of 32."""


@functools.cache
def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of some 400 tokens, most of them from JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


class Fast:
    """The part of mlx-lm's wrapper around a fast tokenizer that `GrammarCompiler` uses."""

    def __init__(self) -> None:
        self.backend_tokenizer = backend()
        pieces = [
            self.backend_tokenizer.id_to_token(i) for i in range(self.backend_tokenizer.get_vocab_size())
        ]
        self.detokenizer = SimpleNamespace(tokenmap=pieces)
        self.added_tokens_decoder = self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab())


@functools.cache
def grammars() -> GrammarCompiler:
    """The compiler for a model with two end-of-text tokens."""
    return GrammarCompiler(Fast(), VOCAB_SIZE, [END, PAD])


def text_of(token_id: int) -> bytes:
    """A token's bytes, by inverting GPT-2's alphabet."""
    piece = backend().id_to_token(token_id)
    table = _bytes_by_character()
    return piece.encode() if piece in SPECIAL else bytes(table[character] for character in piece)


@functools.cache
def _bytes_by_character() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def encoded(text: str) -> list[int]:
    """Token ids as the model's tokenizer encodes the text."""
    return list(backend().encode(text, add_special_tokens=False).ids)


def matcher(text: str) -> GrammarMatcher:
    """A matcher in the state before the first token."""
    return GrammarMatcher(grammars().compile(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_validate(name: str) -> None:
    """Tokens drawn at random from the allowed ones always reach an end, and form JSON that matches the client's schema."""
    schema = SCHEMAS[name]
    text = grammar.for_json_schema(schema)
    assert grammar.check(text) is None
    validator = jsonschema.Draft202012Validator(schema)
    for seed in range(6):
        walk = Walk(grammars().compile(text), text_of, seed).run()
        validator.validate(json.loads(walk.text))


@pytest.mark.parametrize(
    "name", ["strict", "strings", "formats", "tree", "endless branch", "pydantic's union", "numbers"]
)
def test_no_dead_end(name: str) -> None:
    """From every state of a random answer, each allowed token leads to a state from which an end is reached."""
    compiled = grammars().compile(grammar.for_json_schema(SCHEMAS[name]))
    way = Walk(compiled, text_of, seed=3, num_free=12).run().token_ids
    for length in range(0, min(len(way), 36), 3):
        here = GrammarMatcher(compiled)
        advance_all(here, way[:length])
        for token_id in allowed_ids(here)[:: max(1, len(allowed_ids(here)) // 8)]:
            if token_id not in (END, PAD):
                branch = Walk(compiled, text_of, seed=1, num_free=0)
                branch.token_ids = [*way[:length], token_id]
                branch.run()


def test_replay_restores_the_state() -> None:
    """After a takeover, with the same tokens, a matcher is in the same state: all masks are equal."""
    text = grammar.for_json_schema(SCHEMAS["tree"])
    way = Walk(grammars().compile(text), text_of, seed=5).run().token_ids
    live = matcher(text)
    other = GrammarCompiler(Fast(), VOCAB_SIZE, [END, PAD]).compile(text)
    for length, token_id in enumerate(way):
        again = GrammarMatcher(other)
        advance_all(again, way[:length])
        assert np.array_equal(again.allowed(), live.allowed())
        live.advance(token_id)
    assert live.is_finished


def test_matchers_of_one_grammar_are_independent() -> None:
    """Advancing one matcher changes neither another one nor the compiled grammar."""
    compiled = grammars().compile(grammar.for_json_schema({"type": "boolean"}))
    first, second = GrammarMatcher(compiled), GrammarMatcher(compiled)
    before = second.allowed()
    advance_all(first, encoded("true"))
    assert first.is_finished
    assert np.array_equal(second.allowed(), before)
    assert np.array_equal(GrammarMatcher(compiled).allowed(), before)


def test_end_of_text_only_where_the_grammar_can_end() -> None:
    """A number may end or continue, but not end before its first digit; after a closed object only an end is allowed."""
    number = matcher(grammar.for_json_schema({"type": "integer"}))
    assert not {END, PAD} & set(allowed_ids(number))
    advance_all(number, encoded("7"))
    assert {END, PAD} < set(allowed_ids(number))
    assert not number.is_finished
    closed = matcher(grammar.for_json_schema({"type": "object", "additionalProperties": False}))
    advance_all(closed, encoded("{}"))
    assert closed.is_finished
    assert set(allowed_ids(closed)) == {END, PAD}


@pytest.mark.parametrize("end", [END, PAD])
def test_after_the_end(end: int) -> None:
    """After an end-of-text token nothing else is allowed."""
    row = matcher(grammar.for_json_schema({"type": "integer"}))
    advance_all(row, [*encoded("7"), end])
    assert row.is_finished
    assert set(allowed_ids(row)) == {END, PAD}
    with pytest.raises(GrammarError):
        row.advance(encoded("8")[0])


def test_advance_refuses_a_token() -> None:
    """A token against the grammar, an early end, and an id without a token raise an error."""
    text = grammar.for_json_schema({"type": "integer"})
    for token_id in (encoded("x")[0], END, 699, 10**6):
        with pytest.raises(GrammarError):
            matcher(text).advance(token_id)


def test_a_mask_has_the_models_vocabulary_size() -> None:
    """The model's padding tokens are not allowed; `fill` overwrites its complete output."""
    row = matcher(grammar.for_tool_calls(ToolUse(tools=[{"type": "function", "function": {"name": "f"}}])))
    batch = np.full((2, num_words(VOCAB_SIZE)), 0xFFFFFFFF, np.uint32)
    row.fill(batch[1])
    bits = np.unpackbits(batch.view(np.uint8), axis=-1, count=VOCAB_SIZE, bitorder="little")
    assert bits.shape == (2, VOCAB_SIZE)
    assert bits[0].all()
    assert not bits[1, backend().get_vocab_size() :].any()
    assert 200 < bits[1].sum() < 400


def test_a_model_with_fewer_logits_than_tokens() -> None:
    """Masks have the length of the logits; tokens beyond it are not allowed."""
    few = GrammarCompiler(Fast(), 300, [END])
    row = GrammarMatcher(
        few.compile(grammar.for_tool_calls(ToolUse(tools=[{"type": "function", "function": {"name": "f"}}])))
    )
    assert row.allowed().shape == (num_words(300),)


@pytest.mark.parametrize("as_one_token", [True, False])
def test_the_call_marker_is_text(as_one_token: bool) -> None:
    """A tokenizer may mark it as special; it is allowed all the same, as one token or as characters."""
    tools = ToolUse(tools=[{"type": "function", "function": {"name": "f"}}], is_required=True)
    row = matcher(grammar.for_tool_calls(tools))
    advance_all(row, [CALL] if as_one_token else [backend().token_to_id(c) for c in "<tool_call>"])
    advance_all(row, [backend().token_to_id(c) for c in '{"'])
    advance_all(row, encoded('name": "f", "arguments": {}}'))
    advance_all(row, [CALL + 1])
    assert {END, PAD} < set(allowed_ids(row))


def test_text_that_looks_like_a_special_token() -> None:
    """A value that looks like an end-of-text token is written as characters, and ends nothing."""
    compiled = grammars().compile(grammar.for_json_schema({"const": "a<end><pad>"}))
    walk = Walk(compiled, text_of, seed=1).run()
    assert walk.text == '"a<end><pad>"'
    assert not {END, PAD} & set(walk.token_ids)


def test_special_tokens_are_not_text() -> None:
    """Free text allows every token except those that only a template writes."""
    tools = ToolUse(tools=[{"type": "function", "function": {"name": "f"}}])
    row = GrammarMatcher(GrammarCompiler(Fast(), VOCAB_SIZE, [END]).compile(grammar.for_tool_calls(tools)))
    assert PAD not in allowed_ids(row)
    assert set(encoded("Ann said “naïve”")) < set(allowed_ids(row))


def test_compiled_grammars_are_cached() -> None:
    """The same text is compiled once; another text is compiled separately."""
    text = grammar.for_json_schema({"const": "once"})
    assert grammars().compile(text) is grammars().compile(text)
    assert grammars().compile(text) is not grammars().compile(grammar.for_json_schema({"const": "twice"}))


def test_concurrent_compilation() -> None:
    """Threads that compile at once, also the same text, each get the right grammar."""
    texts = [grammar.for_json_schema({"const": f"value {i % 5}"}) for i in range(20)]
    found: dict[int, GrammarMatcher] = {}

    def work(i: int) -> None:
        found[i] = GrammarMatcher(grammars().compile(texts[i]))
        advance_all(found[i], encoded(f'"value {i % 5}"'))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i].is_finished for i in range(20))


def test_a_grammar_that_does_not_compile() -> None:
    """It is a 400 here too, although the API checks grammars."""
    with pytest.raises(RequestError) as raised:
        grammars().compile(grammar.for_json_schema({"enum": []}))
    assert (raised.value.status, raised.value.param) == (400, "response_format")
    with pytest.raises(RequestError):
        grammars().compile("start: nothing")


class Words:
    """A tokenizer that llguidance cannot read from a file: words instead of bytes."""

    vocabulary = ("<end>", "true", "false", "tr", "ue", "x")
    all_special_ids = (0,)

    def __init__(self) -> None:
        self.detokenizer = SimpleNamespace()
        self.added_tokens_decoder: dict[int, str] = {}

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in token_ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.vocabulary.index(text)] if text in self.vocabulary else []


def test_a_tokenizer_without_a_file() -> None:
    """Without a fast tokenizer, text that a grammar forces is tokenized by the tokens' bytes."""
    few = GrammarCompiler(Words(), 40, [0])
    row = GrammarMatcher(few.compile(grammar.for_json_schema({"type": "boolean"})))
    assert set(allowed_ids(row)) == {1, 2, 3}
    row.advance(3)
    row.advance(4)
    assert set(allowed_ids(row)) == {0}


def test_a_grammar_that_the_vocabulary_cannot_express() -> None:
    """It is refused when it is compiled."""
    with pytest.raises(RequestError):
        GrammarCompiler(Words(), 40, [0]).compile(grammar.for_json_schema({"type": "integer"}))
