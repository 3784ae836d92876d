"""Tokens of an answer with thoughts and calls, as events: through the loop, with everything scripted around it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from common.protocol import (
    ChatPrompt,
    Delta,
    Event,
    Finished,
    GenerationJob,
    Piece,
    Reasoning,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    ToolUse,
    Usage,
)
from tests.unit.worker.loop.scripted import Bench, make_job
from worker.loop.engine import InsertResult, StepToken
from worker.loop.messages import Admit
from worker.loop.sequence import Sequence
from worker.text.answer_format import NORMAL, REASONING, ModelFormat
from worker.text.answer_parser import AnswerParser

THINKING = ModelFormat({NORMAL: [("<think>", REASONING)], REASONING: [("</think>", NORMAL)]})
CALL = ["<tool_call>", '{"name": "f", ', '"arguments": {"a"', ": 1}", "}", "</tool_call>"]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def chat(*, is_parallel: bool = True, **job: Any) -> GenerationJob:
    return msgspec.structs.replace(
        make_job("a", **job),
        prompt=ChatPrompt([{"role": "user", "content": "hi"}]),
        tool_use=ToolUse(tools=TOOLS, is_parallel=is_parallel),
    )


def sequence(replayed: list[str] | None = None, **job: Any) -> Sequence:
    asked = chat(**job)
    inserted = InsertResult(
        5, 99, replayed_texts=replayed or [], parser=AnswerParser(asked, THINKING, NORMAL)
    )
    return Sequence(asked, "a-1", inserted, n=len(replayed or []), num_tokens=len(replayed or []))


def take(row: Sequence, *texts: str, end: Any = None) -> tuple[list[Delta], Any]:
    """The events of these tokens; `end` is what the engine says with the last."""
    deltas = []
    for i, text in enumerate(texts):
        reason = end if i == len(texts) - 1 else None
        logprob = TokenLogprob(i, -1.0, text.encode())
        delta, ended = row.take(StepToken("a", i, text, reason, logprob, [logprob]))
        deltas.append(delta)
        if ended is not None:
            return deltas, ended
    return deltas, None


def said(deltas: list[Delta]) -> tuple[str, list[Piece]]:
    return "".join(d.text for d in deltas), [piece for d in deltas for piece in d.pieces]


def calls(*names: str) -> list[Piece]:
    return [ToolCall(i, name) for i, name in enumerate(names)]


def test_an_answer_with_everything() -> None:
    """Thoughts, content and a call in turn; a model that ends with calls has asked for them; thoughts are counted."""
    row = sequence()
    deltas, reason = take(row, "<think>", "h", "m", "</think>", "\n\n", "So", ":", *CALL, "", end="stop")
    text, pieces = said(deltas)
    assert text == "So:"
    assert pieces == [
        Reasoning("h"),
        Reasoning("m"),
        ToolCall(0, "f"),
        ToolArguments(0, '{"a"'),
        ToolArguments(0, ": 1}"),
    ]
    assert reason == "tool_calls"
    assert row.finished(reason) == Finished(15, "tool_calls", Usage(5, 14, 0, 4))


def test_an_answer_that_is_cut() -> None:
    """`length` stays, whatever was called."""
    _, reason = take(sequence(), *CALL, end="length")
    assert reason == "length"


def test_stop_strings_are_for_content() -> None:
    """They are found in it, across tokens, and neither in thoughts nor in arguments nor across a call."""
    row = sequence(stop=["1", "hm", "ab"])
    deltas, reason = take(row, "<think>", "hm", "1", "</think>", "a", *CALL, "b ", "a", "b!")
    text, pieces = said(deltas)
    assert text == "ab "
    assert [p for p in pieces if isinstance(p, Reasoning)] == [Reasoning("hm"), Reasoning("1")]
    assert "".join(p.text for p in pieces if isinstance(p, ToolArguments)) == '{"a": 1}'
    assert reason == "tool_calls"
    deltas, reason = take(sequence(stop=["END"]), "x", "EN", "D", "<tool_call>")
    assert (said(deltas), reason) == (("x", []), "stop")


def test_a_stop_string_that_the_end_completes() -> None:
    """Text that was held back as a marker's beginning is looked through as well."""
    deltas, reason = take(sequence(stop=["<to"]), "x", "<", "to", end="length")
    assert (said(deltas), reason) == (("x", []), "stop")
    deltas, reason = take(sequence(stop=["<tx"]), "x", "<", "to", end="length")
    assert (said(deltas), reason) == (("x<to", []), "length")


def test_the_only_call_ends_the_answer() -> None:
    """Without parallel calls the row is done with the first, though the model would go on."""
    deltas, reason = take(sequence(is_parallel=False), *CALL, *CALL)
    assert len(deltas) == len(CALL)
    assert (said(deltas)[1][:1], reason) == (calls("f"), "tool_calls")


def test_logprobs_are_for_content() -> None:
    """A token has one if its text is content, or may become it; thoughts, arguments and dropped space have none."""
    row = sequence()
    texts = ["<think>", "h", "</think>", "\n\n", "So", " <", "b", "<tool", "_call>", *CALL[1:], "!"]
    deltas, _ = take(row, *texts)
    with_logprob = [text for text, delta in zip(texts, deltas, strict=True) if delta.logprob is not None]
    assert with_logprob == ["So", " <", "b", "<tool", "_call>", CALL[1], "!"]
    assert all(bool(delta.top) == (delta.logprob is not None) for delta in deltas)


@pytest.mark.parametrize("k", range(15))
def test_a_takeover_goes_on_anywhere(k: int) -> None:
    """With the first k tokens replayed, what follows is what would have followed: text, indexes, counts and the end."""
    texts = ["<think>", "h", "</think>", "\n", "Well, <", "*CALL:", *CALL, *CALL[:3]]
    whole_row, second_row = sequence(stop=["NEVER"]), sequence(texts[:k], stop=["NEVER"])
    whole, reason = take(whole_row, *texts, end="length")
    rest, reason_after = take(second_row, *texts[k:], end="length")
    assert [(d.n, d.text, d.pieces) for d in rest] == [(d.n, d.text, d.pieces) for d in whole[k:]]
    assert reason_after == reason
    assert second_row.finished("length") == whole_row.finished("length")


def test_through_the_loop() -> None:
    """Pieces are journaled with their tokens; the row that a parser ends leaves the engine."""
    bench = Bench({"a": [*CALL, "more"]})
    bench.engine.make_parser = lambda job: AnswerParser(job, THINKING, NORMAL)
    job = chat(is_parallel=False, max_tokens=50)
    bench.turn(Admit(job, "a-1", [0], []))
    bench.turn_until(lambda: bool(bench.settled))
    *deltas, finished = bench.journal.events("a")
    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.usage.completion_tokens) == ("tool_calls", len(CALL))
    assert [d.pieces for d in deltas if isinstance(d, Delta)][2] == [
        ToolCall(0, "f"),
        ToolArguments(0, '{"a"'),
    ]
    assert bench.engine.num_sequences == 0


def test_a_takeover_through_the_loop() -> None:
    """A worker that finds half a call in the journal writes the other half."""
    texts = [*CALL, ""]
    alone, second = Bench({"a": texts}), Bench({"a": texts})
    job = chat(max_tokens=len(texts))
    for bench in (alone, second):
        bench.engine.make_parser = lambda asked: AnswerParser(asked, THINKING, NORMAL)
    alone.turn(Admit(job, "a-1", [0], []))
    alone.turn_until(lambda: bool(alone.settled))
    journal: list[Event] = alone.journal.events("a")  # type: ignore[assignment]
    second.journal.entries["a"] = list(alone.journal.entries["a"][:3])
    second.turn(Admit(job, "a-2", [0], journal[:3]))
    second.turn_until(lambda: bool(second.settled))
    assert second.journal.events("a") == journal
