"""Answers with reasoning and tool calls as events: `Sequence` alone, and in the loop."""

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
    SamplingParams,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    ToolUse,
    Usage,
)
from tests.unit.worker.loop.scripted import LoopHarness, make_job
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


def make_sequence(replayed: list[str] | None = None, **fields: Any) -> Sequence:
    job = chat(**fields)
    inserted = InsertResult(5, 99, replayed_texts=replayed or [], parser=AnswerParser(job, THINKING, NORMAL))
    return Sequence(job, "a-1", inserted, last_n=len(replayed or []), num_tokens=len(replayed or []))


def generate(sequence: Sequence, *texts: str, end: Any = None) -> tuple[list[Delta], Any]:
    """The events of tokens with these texts, and the finish reason; `end` is the engine's, with the last token."""
    deltas = []
    for i, text in enumerate(texts):
        reason = end if i == len(texts) - 1 else None
        logprob = TokenLogprob(i, -1.0, text.encode())
        delta, ended = sequence.make_delta(StepToken("a", i, text, reason, logprob, [logprob]))
        deltas.append(delta)
        if ended is not None:
            return deltas, ended
    return deltas, None


def text_and_pieces(deltas: list[Delta]) -> tuple[str, list[Piece]]:
    return "".join(d.text for d in deltas), [piece for d in deltas for piece in d.pieces]


def calls(*names: str) -> list[Piece]:
    return [ToolCall(i, name) for i, name in enumerate(names)]


def test_reasoning_content_and_a_call() -> None:
    """An answer with reasoning, content and a call is split in order; it finishes with `tool_calls`; reasoning tokens are counted."""
    sequence = make_sequence()
    deltas, reason = generate(
        sequence, "<think>", "h", "m", "</think>", "\n\n", "So", ":", *CALL, "", end="stop"
    )
    text, pieces = text_and_pieces(deltas)
    assert text == "So:"
    assert pieces == [
        Reasoning("h"),
        Reasoning("m"),
        ToolCall(0, "f"),
        ToolArguments(0, '{"a"'),
        ToolArguments(0, ": 1}"),
    ]
    assert reason == "tool_calls"
    assert sequence.make_finished(reason) == Finished(15, "tool_calls", Usage(5, 14, 0, 4))


def test_length_stays_the_finish_reason() -> None:
    """An answer cut by its length finishes with `length`, even if it has a call."""
    _, reason = generate(make_sequence(), *CALL, end="length")
    assert reason == "length"


def test_stop_strings_match_in_content_only() -> None:
    """They match in content, across tokens, but not in reasoning, in arguments, or across a call."""
    sequence = make_sequence(stop=["1", "hm", "ab"])
    deltas, reason = generate(sequence, "<think>", "hm", "1", "</think>", "a", *CALL, "b ", "a", "b!")
    text, pieces = text_and_pieces(deltas)
    assert text == "ab "
    assert [p for p in pieces if isinstance(p, Reasoning)] == [Reasoning("hm"), Reasoning("1")]
    assert "".join(p.text for p in pieces if isinstance(p, ToolArguments)) == '{"a": 1}'
    assert reason == "tool_calls"
    deltas, reason = generate(make_sequence(stop=["END"]), "x", "EN", "D", "<tool_call>")
    assert (text_and_pieces(deltas), reason) == (("x", []), "stop")


def test_stop_strings_match_in_text_released_at_the_end() -> None:
    """Text that was held back as the possible start of a marker is searched too when the answer ends."""
    deltas, reason = generate(make_sequence(stop=["<to"]), "x", "<", "to", end="length")
    assert (text_and_pieces(deltas), reason) == (("x", []), "stop")
    deltas, reason = generate(make_sequence(stop=["<tx"]), "x", "<", "to", end="length")
    assert (text_and_pieces(deltas), reason) == (("x<to", []), "length")


def test_the_only_call_ends_the_answer() -> None:
    """Without parallel calls the answer ends with the first call, even if the model would continue."""
    deltas, reason = generate(make_sequence(is_parallel=False), *CALL, *CALL)
    assert len(deltas) == len(CALL)
    assert (text_and_pieces(deltas)[1][:1], reason) == (calls("f"), "tool_calls")


def test_only_content_has_logprobs() -> None:
    """A token has them if its text is content or may become it; reasoning, arguments and dropped white space have none."""
    sequence = make_sequence()
    texts = ["<think>", "h", "</think>", "\n\n", "So", " <", "b", "<tool", "_call>", *CALL[1:], "!"]
    deltas, _ = generate(sequence, *texts)
    with_logprob = [text for text, delta in zip(texts, deltas, strict=True) if delta.logprob is not None]
    assert with_logprob == ["So", " <", "b", "<tool", "_call>", CALL[1], "!"]
    assert all(bool(delta.top) == (delta.logprob is not None) for delta in deltas)


@pytest.mark.parametrize("k", range(15))
def test_a_takeover_continues_after_any_token(k: int) -> None:
    """After replaying the first k tokens, the rest equals that of an uninterrupted run: text, indices, counts and finish reason."""
    texts = ["<think>", "h", "</think>", "\n", "Well, <", "*CALL:", *CALL, *CALL[:3]]
    first, second = make_sequence(stop=["NEVER"]), make_sequence(texts[:k], stop=["NEVER"])
    whole, reason = generate(first, *texts, end="length")
    rest, reason_after = generate(second, *texts[k:], end="length")
    assert [(d.n, d.text, d.pieces) for d in rest] == [(d.n, d.text, d.pieces) for d in whole[k:]]
    assert reason_after == reason
    assert second.make_finished("length") == first.make_finished("length")


def test_calls_are_journaled_by_the_loop() -> None:
    """Pieces are journaled with their tokens; the engine releases a sequence that its parser ends."""
    harness = LoopHarness({"a": [*CALL, "more"]})
    harness.engine.make_parser = lambda job: AnswerParser(job, THINKING, NORMAL)
    job = chat(is_parallel=False, max_tokens=50)
    harness.run(Admit(job, "a-1", [0], []))
    harness.run_until(lambda: bool(harness.job_ends))
    *deltas, finished = harness.journal.events("a")
    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.usage.completion_tokens) == ("tool_calls", len(CALL))
    assert [d.pieces for d in deltas if isinstance(d, Delta)][2] == [
        ToolCall(0, "f"),
        ToolArguments(0, '{"a"'),
    ]
    assert harness.engine.num_sequences == 0


def test_a_takeover_completes_a_call() -> None:
    """A worker that finds an incomplete call in the journal completes it."""
    texts = [*CALL, ""]
    first, second = LoopHarness({"a": texts}), LoopHarness({"a": texts})
    job = chat(max_tokens=len(texts))
    for harness in (first, second):
        harness.engine.make_parser = lambda job: AnswerParser(job, THINKING, NORMAL)
    first.run(Admit(job, "a-1", [0], []))
    first.run_until(lambda: bool(first.job_ends))
    journal: list[Event] = first.journal.events("a")  # type: ignore[assignment]
    second.journal.entries["a"] = list(first.journal.entries["a"][:3])
    second.run(Admit(job, "a-2", [0], journal[:3]))
    second.run_until(lambda: bool(second.job_ends))
    assert second.journal.events("a") == journal


def test_finished_names_the_stop_string() -> None:
    """The terminal event names the stop string that ended the answer, also one split over tokens; otherwise none."""
    sequence = make_sequence(stop=["one", "END"])
    _, reason = generate(sequence, "Hello ", "E", "ND", " more")
    assert sequence.make_finished(reason).stop_string == "END"
    sequence = make_sequence(stop=["one", "END"])
    _, reason = generate(sequence, "Hello ", "EN", end="stop")
    assert sequence.make_finished(reason).stop_string is None


@pytest.mark.parametrize("num_replayed", [0, 1, 2, 3])
def test_stop_strings_after_min_tokens(num_replayed: int) -> None:
    """A stop string in the first `min_tokens` tokens does not end the answer, also after a takeover; a later one does."""
    texts = ["one STOP ", "two STOP ", "three ", "STOP four"]
    fields: dict[str, Any] = {"stop": ["STOP"], "sampling": SamplingParams(min_tokens=2)}
    sequence = make_sequence(texts[:num_replayed], **fields)
    deltas, reason = generate(sequence, *texts[num_replayed:])
    assert "".join(delta.text for delta in deltas) == "".join([*texts[:3]][num_replayed:])
    assert reason == "stop"


def test_a_plain_answer_after_min_tokens() -> None:
    """The same without a parser."""
    job = make_job("a", stop=["x"], sampling=SamplingParams(min_tokens=1))
    sequence = Sequence(job, "a-1", InsertResult(5, 99))
    deltas, reason = generate(sequence, "x", "ax")
    assert ([delta.text for delta in deltas], reason) == (["x", "a"], "stop")


def test_the_only_call_does_not_end_an_answer_too_early() -> None:
    """The answer goes on, without text, until it has `min_tokens` tokens and one more."""
    sequence = make_sequence(is_parallel=False, sampling=SamplingParams(min_tokens=len(CALL) + 2))
    deltas, reason = generate(sequence, *CALL, "", "", "", "")
    assert (len(deltas), reason) == (len(CALL) + 3, "tool_calls")


@pytest.mark.parametrize(("includes_stop", "expected"), [(False, "ab"), (True, "abSTOP")])
def test_the_stop_string_in_the_text(includes_stop: bool, expected: str) -> None:
    """Is left out unless the client asks for it; what follows it always is."""
    job = make_job("a", stop=["STOP"], includes_stop=includes_stop)
    sequence = Sequence(job, "e", InsertResult(1, 9))
    deltas = [sequence.make_delta(StepToken("a", i, text, None)) for i, text in enumerate(("abST", "OPcd"))]
    assert "".join(delta.text for delta, _ in deltas) == expected
    assert deltas[-1][1] == "stop"
