"""`/v1/responses` with the openai SDK, against gunicorn, Redis and a scripted worker."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from api import keys
from bench.harness.pool import Pool
from common.protocol import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationJob,
    Reasoning,
    Started,
    ToolArguments,
    ToolCall,
    Usage,
)
from tests.e2e.api_pool import MODEL, ApiPool, api_pool
from tests.fake_worker import PROMPT_TOKENS, WORDS, FakeWorker, words
from tests.redis.pool_of_workers import wait_until

TEXT = "".join(WORDS)
F = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False}


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool(num_processes=2) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


@pytest.fixture
def client(api: ApiPool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=api.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**({"model": MODEL, "input": "hi"} | fields))


def slow(job: GenerationJob) -> Iterator[Event | float]:
    """Until it is cancelled, or for some seconds."""
    return words(job, [" word"] * 100, pause=0.05)


def follow_calls(api: ApiPool) -> None:
    """The worker thinks, and calls a function and a custom tool."""

    def calls(_job: GenerationJob) -> Iterator[Event | float]:
        yield Started(0, PROMPT_TOKENS)
        yield Delta(1, 1, pieces=[Reasoning("hm")])
        yield Delta(2, 2, pieces=[ToolCall(0, "f"), ToolArguments(0, "{}")])
        yield Delta(3, 3, pieces=[ToolCall(1, "run"), ToolArguments(1, '{"input": "a\\nb"}')])
        yield Finished(4, "tool_calls", Usage(PROMPT_TOKENS, 3, 0, 1))

    api.follow(calls)


def test_a_response(client: openai.OpenAI) -> None:
    """Text, usage and status; stored by default."""
    answer = ask(client, instructions="Be brief.", metadata={"k": "v"})
    assert (answer.object, answer.status, answer.model, answer.output_text) == (
        "response",
        "completed",
        MODEL,
        TEXT,
    )
    assert (answer.instructions, answer.metadata, answer.store) == ("Be brief.", {"k": "v"}, True)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (PROMPT_TOKENS, len(WORDS))
    assert usage.input_tokens_details.cached_tokens == 2
    assert client.responses.retrieve(answer.id) == answer


def test_a_path_without_the_version(api: ApiPool) -> None:
    """Served, too; the error of an unsupported field names it."""
    body = json.dumps({"input": "hi", "store": False}).encode()
    assert api.ask("POST", "/responses", body).json["store"] is False
    refused = api.ask(
        "POST", "/v1/responses", json.dumps({"input": [{"role": "user", "content": 5}]}).encode()
    )
    assert (refused.status, refused.error["param"]) == (400, "input[0].content")


def test_what_has_no_effect_is_named(api: ApiPool) -> None:
    """In the header of every endpoint."""
    tools = [{"type": "web_search"}, F]
    body = json.dumps({"input": "hi", "tools": tools, "client_metadata": {}}).encode()
    answer = api.ask("POST", "/v1/responses", body)
    assert answer.status == 200
    assert answer.headers["x-ignored-parameters"] == "client_metadata, tools[0]"


def test_the_sdk_accumulates_a_stream(client: openai.OpenAI) -> None:
    """`responses.stream`: deltas, and the final response, which is the stored one."""
    with client.responses.stream(model=MODEL, input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas == WORDS
    assert final.output_text == TEXT
    assert client.responses.retrieve(final.id).output_text == TEXT


def test_calls(api: ApiPool, client: openai.OpenAI) -> None:
    """Reasoning, a function and a custom tool, streamed and not; the next turn refers to them by id."""
    follow_calls(api)
    tools: list[Any] = [F, {"type": "custom", "name": "run"}]
    answer = ask(client, tools=tools, reasoning={"summary": "auto"})
    thoughts, call, run = answer.output
    assert (thoughts.summary[0].text, call.name, call.arguments, run.input) == ("hm", "f", "{}", "a\nb")
    with client.responses.stream(model=MODEL, input="hi", tools=tools) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "function_call", "custom_tool_call"]
    api.follow(words)
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "1"},
        {"type": "custom_tool_call_output", "call_id": run.call_id, "output": "2"},
    ]
    assert ask(client, input=results, previous_response_id=answer.id, tools=tools).output_text == TEXT
    [prompt] = [job.prompt for job in api.worker.jobs]
    _, turn, first, second = prompt.messages  # type: ignore[union-attr]
    assert turn["reasoning_content"] == "hm"
    assert [each["function"]["name"] for each in turn["tool_calls"]] == ["f", "run"]
    assert [(m["name"], m["content"]) for m in (first, second)] == [("f", "1"), ("run", "2")]


def test_a_stateless_conversation(api: ApiPool, client: openai.OpenAI) -> None:
    """As Codex has it: the output goes back as it is, the thoughts in their encoded form."""
    follow_calls(api)
    tools: list[Any] = [F, {"type": "custom", "name": "run"}]
    include: list[Any] = ["reasoning.encrypted_content"]
    answer = ask(client, tools=tools, store=False, include=include, stream=False)
    sent = [
        {"role": "user", "content": "hi"},
        *(item.model_dump(exclude_none=True) for item in answer.output),
    ]
    sent[1] = {k: v for k, v in sent[1].items() if k != "content"}
    api.follow(words)
    assert ask(client, input=sent, tools=tools, store=False, include=include).output_text == TEXT
    assert api.worker.jobs[-1].prompt.messages[1]["reasoning_content"] == "hm"  # type: ignore[union-attr]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_input_items(client: openai.OpenAI) -> None:
    """All that a response was generated from, newest first, over several pages."""
    first = ask(client, input="One?")
    second = ask(client, input=[{"role": "user", "content": "Two?"}], previous_response_id=first.id)
    items = list(client.responses.input_items.list(second.id, limit=2))
    assert [item.content[0].text for item in items] == ["Two?", TEXT, "One?"]  # type: ignore[union-attr, index]
    assert len({item.id for item in items}) == 3
    [only] = client.responses.input_items.list(first.id, order="asc").data
    assert only.id == items[-1].id


def test_delete(client: openai.OpenAI) -> None:
    """A deleted response is gone, for every endpoint."""
    answer = ask(client)
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, previous_response_id=answer.id)
    assert error.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(answer.id)


def test_background(client: openai.OpenAI) -> None:
    """Answered at once; its status can be polled until it is complete."""
    answer = ask(client, background=True)
    assert (answer.status, answer.output, answer.background) == ("queued", [], True)
    wait_until(lambda: client.responses.retrieve(answer.id).status == "completed")
    assert client.responses.retrieve(answer.id).output_text == TEXT


def test_a_background_stream_goes_on_without_its_client(api: ApiPool, client: openai.OpenAI) -> None:
    """The client leaves in the middle, and continues after the last number that it saw, perhaps at another process."""
    api.follow(lambda job: words(job, [" word"] * 20, pause=0.02))
    stream = ask(client, background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 9:
            break
    stream.close()
    response_id = seen[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
    assert [event.type for event in seen[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    numbers = [event.sequence_number for event in [*seen, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == " word" * 20
    again = list(client.responses.retrieve(response_id, stream=True))
    assert [event.model_dump() for event in again] == [event.model_dump() for event in [*seen, *rest]]


def test_cancel(api: ApiPool, client: openai.OpenAI) -> None:
    """A response in the background ends when it is cancelled, and keeps what it had; once more changes nothing."""
    api.follow(slow)
    answer = ask(client, background=True)
    wait_until(lambda: bool(client.responses.retrieve(answer.id).output))
    assert client.responses.cancel(answer.id).status == "cancelled"
    assert client.responses.cancel(answer.id).status == "cancelled"
    wait_until(lambda: answer.id.removeprefix("resp_") in api.worker.cancelled)
    assert client.responses.retrieve(answer.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        ask(client, previous_response_id=answer.id)


def test_only_a_background_response_can_be_cancelled(client: openai.OpenAI) -> None:
    """As in OpenAI's API."""
    answer = ask(client)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(answer.id)


def test_a_running_response_is_cancelled_when_it_is_deleted(api: ApiPool, client: openai.OpenAI) -> None:
    """Its job ends soon."""
    api.follow(slow)
    answer = ask(client, background=True)
    wait_until(lambda: bool(api.worker.jobs))
    with pytest.raises(openai.ConflictError) as error:
        ask(client, previous_response_id=answer.id)
    assert error.value.code == "previous_response_in_progress"
    client.responses.delete(answer.id)
    wait_until(lambda: answer.id.removeprefix("resp_") in api.worker.cancelled)


def test_a_failure_in_a_stream(api: ApiPool, client: openai.OpenAI) -> None:
    """`response.failed` once the stream has begun; before, the status."""

    def failing(_job: GenerationJob) -> Iterator[Event | float]:
        yield Started(0, PROMPT_TOKENS)
        yield Delta(1, 1, "Hel")
        yield 0.1
        yield Failed(2, "The worker broke.", code="engine_failed")

    api.follow(failing)
    *_, last = ask(client, stream=True)
    assert (last.type, last.response.status, last.response.error.code) == (
        "response.failed",
        "failed",
        "engine_failed",
    )
    assert client.responses.retrieve(last.response.id).status == "failed"

    def refusing(_job: GenerationJob) -> Iterator[Event | float]:
        yield Failed(1, "Too long.", 400, "invalid_request_error", "messages", "context_length_exceeded")

    api.follow(refusing)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, stream=True)
    assert (error.value.param, error.value.code) == ("input", "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "{id}?stream=maybe", "stream"),
        ("GET", "{id}?starting_after=1", "starting_after"),
        ("GET", "{id}?stream=true&starting_after=x", "starting_after"),
        ("GET", "{id}/input_items?limit=0", "limit"),
        ("GET", "{id}/input_items?limit=x", "limit"),
        ("GET", "{id}/input_items?order=up", "order"),
        ("GET", "{id}/input_items?after=x", "after"),
    ],
)
def test_queries(api: ApiPool, method: str, path: str, param: str) -> None:
    """A wrong parameter of a query is a 400 that names it."""
    made = api.ask("POST", "/v1/responses", b'{"input": "hi"}').json
    answer = api.ask(method, "/v1/responses/" + path.format(id=made["id"]))
    assert (answer.status, answer.error["param"]) == (400, param)


def test_last_event_id(api: ApiPool) -> None:
    """A stream continues after the frame that the header names, as after `starting_after`; a frame of another stream is a 400."""
    first, other = (api.ask("POST", "/v1/responses", b'{"input": "hi"}').json["id"] for _ in range(2))

    def rest(last: str | None, query: str = "") -> Any:
        headers = {} if last is None else {"last_event_id": last}
        return api.ask("GET", f"/v1/responses/{first}?stream=true{query}", **headers)

    job_id, other_job_id = first.removeprefix("resp_"), other.removeprefix("resp_")
    assert f"id: {job_id}:3\n".encode() in rest(None).body
    assert rest(f"{job_id}:3").body == rest(None, "&starting_after=3").body != rest(None).body
    for wrong in (f"{other_job_id}:3", f"{first}:3", "17", f"{job_id}:", f"{job_id}:x", f"{job_id}:-1"):
        answer = rest(wrong)
        assert (answer.status, answer.error["param"]) == (400, "Last-Event-ID")


@pytest.mark.parametrize("path", ["zzz", "resp_" + "0" * 30, "resp_" + "0" * 30 + "/input_items"])
def test_unknown_ids(api: ApiPool, path: str) -> None:
    """Well-formed or not: a 404."""
    answer = api.ask("GET", f"/v1/responses/{path}")
    assert (answer.status, answer.error["code"]) == (404, "not_found")


def test_a_full_store(api: ApiPool) -> None:
    """By default a response is then served without being stored, and says so; a client that needs the store gets a 503."""
    with Pool({"MLXPOOL_MAX_STORED_MB": "1"}) as pool, FakeWorker(pool.redis_url, MODEL, words):
        pool.start_api()
        big = {"input": secrets.token_hex(2**20)}
        with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
            answer = ask(client, **big)
            assert (answer.store, answer.output_text) == (False, TEXT)
            for fields in ({"store": True}, {"background": True}):
                with pytest.raises(openai.InternalServerError) as error:
                    ask(client, **big, **fields)
                assert error.value.code == "response_store_full"


def test_keys(tmp_path: Path) -> None:
    """A response exists only for the key that made it."""
    path = tmp_path / "keys.json"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    with Pool({"MLXPOOL_API_KEYS_FILE": str(path)}) as pool, FakeWorker(pool.redis_url, MODEL, words):
        pool.start_api()
        clients = [openai.OpenAI(base_url=f"{pool.url}/v1", api_key=key, max_retries=0) for key in (ann, bob)]
        answer = ask(clients[0], background=True)
        wait_until(lambda: clients[0].responses.retrieve(answer.id).status == "completed")
        for use in (clients[1].responses.retrieve, clients[1].responses.delete, clients[1].responses.cancel):
            with pytest.raises(openai.NotFoundError):
                use(answer.id)
        with pytest.raises(openai.NotFoundError):
            ask(clients[1], previous_response_id=answer.id)
        with pytest.raises(openai.NotFoundError):
            list(clients[1].responses.input_items.list(answer.id))
        assert ask(clients[0], previous_response_id=answer.id).output_text == TEXT
