"""What a request refers to in the store becomes part of its conversation, and how its own response is stored."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import msgspec
import pytest

from api.generation.request import Retention, answer_record
from api.generation.stored_answer import AnswerState, AnswerStatus, StoredAnswer
from api.openai.responses import names
from api.openai.responses.request import ResponseRequest
from api.openai.responses.stored import lookup, pages
from api.openai.responses.stored.completion import complete
from common.errors import RequestError
from common.protocol import Delta, Event, Failed, Finished, Reasoning, ToolArguments, ToolCall, Usage
from tests.unit.api.openai.records import MODEL
from tests.unit.api.openai.responses.requests import parse

TTL_SECONDS = 60
MAX_BYTES = 10_000
END = Finished(9, "stop", Usage(3, 4))


class FakeAnswers:
    """A store with the answers of one owner, ann."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[StoredAnswer, AnswerState]] = {}

    def put(
        self, events: list[Event] | None = None, *, status: AnswerStatus = "completed", **fields: Any
    ) -> str:
        """Store the answer of a request with this body; returns the id of its response."""
        request = completed(self, **fields)
        [job] = request.jobs(lookup.FRONT_END, MODEL, "c", [1])
        record = answer_record(job)
        assert request.retention is not None
        answer = StoredAnswer(record=record, model="m", retention=request.retention)
        error = RequestError("no", status=500) if status == "failed" else None
        state = AnswerState(
            status=status, error=error, choices=[[Delta(1, 1, "Hello"), END] if events is None else events]
        )
        self.answers[answer.id] = (answer, state)
        return names.response_id(answer.id)

    @property
    def response_ttl_seconds(self) -> int:
        return TTL_SECONDS

    @property
    def max_conversation_bytes(self) -> int:
        return MAX_BYTES

    async def load(self, answer_id: str, owner: str) -> StoredAnswer:
        if owner != "ann" or answer_id not in self.answers:
            raise RequestError("none", status=404, code="not_found")
        return self.answers[answer_id][0]

    async def state(self, answer: StoredAnswer) -> AnswerState:
        return self.answers[answer.id][1]

    async def cancel(self, answer: StoredAnswer) -> None:
        raise NotImplementedError

    async def delete(self, answer: StoredAnswer) -> None:
        raise NotImplementedError

    def follow(self, answer: StoredAnswer) -> Any:
        raise NotImplementedError


async def ready(answers: FakeAnswers, owner: str, **fields: Any) -> ResponseRequest:
    request = await complete(parse(**fields), answers, owner)
    assert isinstance(request, ResponseRequest)
    return request


def completed(answers: FakeAnswers, owner: str = "ann", **fields: Any) -> ResponseRequest:
    """A request as it is after both steps."""
    return asyncio.run(ready(answers, owner, **fields))


def refused(answers: FakeAnswers, owner: str = "ann", **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        completed(answers, owner, **fields)
    return error.value


def messages(request: ResponseRequest) -> list[tuple[str, str]]:
    [prompt] = request.prompts
    return [(m["role"], m["content"]) for m in prompt.messages]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, True)),
        ({"store": None}, (False, True)),
        ({"store": True}, (False, False)),
        ({"background": True}, (True, False)),
        ({"store": False}, None),
    ],
)
def test_retention(fields: dict[str, Any], expected: tuple[bool, bool] | None) -> None:
    """Stored by default, if there is room; always if the client asks for it; in the background without its client."""
    request = completed(FakeAnswers(), **fields)
    found = request.retention and (request.retention.is_detached, request.retention.is_optional)
    assert found == expected
    assert request.is_background == bool(fields.get("background"))
    if request.retention is not None:
        assert request.retention.ttl_seconds == TTL_SECONDS
        assert request.retention.details is not None


def test_the_response_says_whether_it_is_stored() -> None:
    """Also if the store was full, so that the endpoint dropped the retention."""
    request = completed(FakeAnswers())
    for retention, expected in ((request.retention, True), (None, False)):
        [job] = msgspec.structs.replace(request, retention=retention).jobs(lookup.FRONT_END, MODEL, "c", [1])
        state = AnswerState(status="completed", error=None, choices=[[END]])
        answer = StoredAnswer(record=answer_record(job), model="m", retention=Retention(ttl_seconds=1))
        assert json.loads(lookup.body(answer, state))["store"] is expected


def test_a_conversation_of_three_turns() -> None:
    """Each has the items and the output of those before it; instructions are not inherited."""
    answers = FakeAnswers()
    first = answers.put(input="One?", instructions="Be brief.")
    second = answers.put(input="Two?", previous_response_id=first)
    third = completed(answers, input="Three?", previous_response_id=second, instructions="Be long.")
    assert messages(third) == [
        ("system", "Be long."),
        ("user", "One?"),
        ("assistant", "Hello"),
        ("user", "Two?"),
        ("assistant", "Hello"),
        ("user", "Three?"),
    ]
    assert third.extra_bytes > 100
    assert third.retention is not None
    assert not third.retention.is_optional


def test_calls_and_thoughts_are_continued() -> None:
    """A result needs no more than the id of the call that the stored response made."""
    answers = FakeAnswers()
    pieces = [Reasoning("hm"), ToolCall(0, "f"), ToolArguments(0, '{"a":1}')]
    first = answers.put([Delta(1, 1, pieces=pieces), END], tools=[{"type": "function", "name": "f"}])
    answer, state = answers.answers[names.job_of_response(first) or ""]
    call = lookup.output_items(answer, state)[1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    [prompt] = completed(answers, input=[result], previous_response_id=first).prompts
    _, turn, output = prompt.messages  # type: ignore[union-attr]
    assert turn["reasoning_content"] == "hm"
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (output["role"], output["name"], output["content"]) == ("tool", "f", "2")


def test_references() -> None:
    """To an item of the conversation before, and to items of any other stored response of the same key."""
    answers = FakeAnswers()
    first = answers.put(
        input=[{"role": "user", "content": "One?"}, {"role": "user", "content": "x", "id": "mine"}]
    )
    answer, state = answers.answers[names.job_of_response(first) or ""]
    [said] = lookup.output_items(answer, state)
    asked = lookup.input_items(answer)[0]
    both = [
        {"type": "item_reference", "id": asked["id"]},
        {"id": said["id"]},
        {"role": "user", "content": "Two?"},
    ]
    assert messages(completed(answers, input=both)) == [
        ("user", "One?"),
        ("assistant", "Hello"),
        ("user", "Two?"),
    ]
    own = [{"type": "item_reference", "id": "mine"}]
    assert messages(completed(answers, input=own, previous_response_id=first))[-1] == ("user", "x")
    for item_id in ("mine", said["id"][:-1] + "7", "msg_" + "0" * 30 + "_0"):
        error = refused(answers, input=[{"type": "item_reference", "id": item_id}])
        assert (error.status, error.param, error.code) == (404, "input[0].id", "item_not_found")
    assert refused(answers, "bob", input=both).code == "item_not_found"


def test_previous_responses_that_cannot_be_continued() -> None:
    """Unknown, another key's, of another endpoint, still running, failed or cancelled."""
    answers = FakeAnswers()
    stored = answers.put()
    for owner, response_id in (("ann", "resp_" + "0" * 30), ("ann", "zzz"), ("bob", stored)):
        error = refused(answers, owner, previous_response_id=response_id)
        assert (error.status, error.param, error.code) == (
            404,
            "previous_response_id",
            "previous_response_not_found",
        )
    running = answers.put([], status="in_progress")
    assert refused(answers, previous_response_id=running).status == 409
    for status in ("failed", "cancelled"):
        error = refused(answers, previous_response_id=answers.put([], status=status))
        assert (error.status, error.code) == (400, "previous_response_not_complete")
    answer, state = answers.answers[names.job_of_response(stored) or ""]
    resumable = msgspec.structs.replace(answer, retention=Retention(ttl_seconds=1, is_detached=True))
    answers.answers[answer.id] = (resumable, state)
    assert refused(answers, previous_response_id=stored).status == 404


def test_an_incomplete_response_can_be_continued() -> None:
    """Its text was cut by its maximum length."""
    answers = FakeAnswers()
    cut = answers.put([Delta(1, 1, "Hel"), Finished(2, "length", Usage(1, 1))], status="incomplete")
    assert messages(completed(answers, input="On.", previous_response_id=cut))[1] == ("assistant", "Hel")


def test_background_needs_a_stored_response() -> None:
    """OpenAI refuses this too."""
    with pytest.raises(RequestError) as error:
        parse(background=True, store=False)
    assert error.value.param == "store"


@pytest.mark.parametrize(
    ("status", "events", "expected"),
    [
        ("queued", [], ("queued", None)),
        ("in_progress", [Delta(1, 1, "Hel")], ("in_progress", "Hel")),
        ("completed", [Delta(1, 1, "Hel"), END], ("completed", "Hel")),
        ("incomplete", [Delta(1, 1, "Hel"), Finished(2, "length", Usage(1, 1))], ("incomplete", "Hel")),
        ("failed", [Delta(1, 1, "Hel"), Failed(2, "no")], ("failed", "Hel")),
        ("cancelled", [Delta(1, 1, "Hel")], ("cancelled", "Hel")),
    ],
)
def test_bodies(status: AnswerStatus, events: list[Event], expected: tuple[str, str | None]) -> None:
    """A response in each of its states, with its output so far."""
    answers = FakeAnswers()
    stored = answers.put(events, status=status, background=True)
    body = json.loads(lookup.body(*answers.answers[names.job_of_response(stored) or ""]))
    text = body["output"][0]["content"][0]["text"] if body["output"] else None
    assert (body["status"], text) == expected
    assert (body["id"], body["background"], body["store"]) == (stored, True, True)
    assert (body["error"] is not None) == (status == "failed")


def test_thoughts_on_request() -> None:
    """A client may ask for the encoded form later."""
    answers = FakeAnswers()
    stored = answers.put([Delta(1, 1, pieces=[Reasoning("hm")]), END])
    found = answers.answers[names.job_of_response(stored) or ""]
    for with_thoughts in (False, True):
        item = json.loads(lookup.body(*found, with_thoughts=with_thoughts))["output"][0]
        assert ("encrypted_content" in item) == with_thoughts


ITEMS = [{"role": "user", "content": str(i), "id": f"i{i}"} for i in range(5)]


@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_pages(limit: int, is_descending: bool) -> None:
    """All pages together are the items, in either order."""
    after, found = None, []
    for _ in itertools.count():
        listed = pages.page(ITEMS, limit=limit, is_descending=is_descending, after=after)
        found += [item["id"] for item in listed.data]
        assert (listed.first_id, listed.last_id) == (listed.data[0]["id"], listed.data[-1]["id"])
        after = listed.last_id
        if not listed.has_more:
            break
    expected = [item["id"] for item in ITEMS]
    assert found == (expected[::-1] if is_descending else expected)


def test_listed_items_are_complete() -> None:
    """With what clients may leave out; the others as they are."""
    call = {"type": "function_call", "id": "c", "call_id": "c1", "name": "f", "arguments": "{}"}
    answer = {"role": "assistant", "content": "Hi.", "id": "a"}
    listed = pages.page([ITEMS[0], answer, call], limit=9, is_descending=False, after=None)
    assert listed.data == [
        {
            "id": "i0",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_text", "text": "0"}],
        },
        {
            "id": "a",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
        },
        call,
    ]
    empty = pages.page([], limit=9, is_descending=False, after=None)
    assert (empty.data, empty.first_id, empty.last_id, empty.has_more) == ([], None, None, False)
    with pytest.raises(RequestError) as error:
        pages.page(ITEMS, limit=9, is_descending=False, after="zzz")
    assert error.value.param == "after"


def test_a_chain_of_responses_is_bounded() -> None:
    """Each stores the conversation before it, so a client could otherwise make one of any size from small requests."""
    answers = FakeAnswers()
    last = answers.put(input="x" * 1000)
    for _ in range(4):
        last = answers.put(input="x" * 1000, previous_response_id=last)
    assert completed(answers, input="x" * 2000, previous_response_id=last).extra_bytes > 5000
    error = refused(answers, input="x" * 5000, previous_response_id=last)
    assert (error.status, error.param, error.code) == (413, "previous_response_id", "request_too_large")


def test_references_to_one_large_item_are_bounded() -> None:
    """A reference is a few bytes of the body, but the item is in the prompt each time."""
    answers = FakeAnswers()
    item_id = names.output_id(answers.put([Delta(1, 1, "x" * 4000), END])[5:], "message", 0)
    assert completed(answers, input=[{"type": "item_reference", "id": item_id}] * 2).extra_bytes > 8000
    error = refused(answers, input=[{"type": "item_reference", "id": item_id}] * 3)
    assert (error.status, error.param) == (413, "input[2].id")


@pytest.mark.parametrize("item_id", [None, "", 5, {"a": 1}])
def test_an_input_item_whose_id_is_no_string_gets_one(item_id: object) -> None:
    """Items of built-in tools are stored as the client sent them."""
    answers = FakeAnswers()
    items = [{"type": "web_search_call", "id": item_id}, {"role": "user", "content": "hi"}]
    response_id = answers.put(input=items)
    answer, _ = answers.answers[response_id[5:]]
    ids = [item["id"] for item in lookup.input_items(answer)]
    assert all(isinstance(each, str) and each for each in ids)
    reference = {"type": "item_reference", "id": ids[1]}
    assert messages(completed(answers, input=[reference])) == [("user", "hi")]
