"""Paths, methods and headers over the wire: gunicorn and the app as they are deployed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.api_pool import MODEL, ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import WORDS, words


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool() as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_chat_with_and_without_v1(api: ApiPool, path: str) -> None:
    """`/v1` may be left out."""
    answer = api.ask("POST", path, chat_body(), content_type="application/json")
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, "".join(WORDS))


@pytest.mark.parametrize(
    "path",
    ["//v1/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions", "//chat//completions"],
)
def test_other_spellings_of_a_path(api: ApiPool, path: str) -> None:
    """Clients join a base address and a path in many ways."""
    assert api.ask("POST", path, chat_body(), content_type="application/json").status == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
def test_the_root_says_what_answers(api: ApiPool, path: str) -> None:
    """For people, and for clients that look at a base address first."""
    answer = api.ask("GET", path)
    assert (answer.status, answer.json["name"]) == (200, "mlx-pool")
    assert "POST /v1/chat/completions" in answer.json["endpoints"]
    assert api.ask("HEAD", path).status == 200


def test_a_404_says_what_is_served(api: ApiPool) -> None:
    """In the format of the path's protocol."""
    refused = api.ask("POST", "/v1/embeddings", b"{}", content_type="application/json")
    assert refused.status == 404
    assert "embeddings" in refused.error["message"]
    assert "POST /v1/responses" in refused.error["message"]
    anthropic = api.ask("POST", "/v1/messages/batches", b"{}", content_type="application/json")
    assert (anthropic.status, anthropic.json["type"]) == (404, "error")
    assert "batches" in anthropic.json["error"]["message"]
    compact = api.ask("POST", "/v1/responses/compact", b"{}", content_type="application/json")
    assert compact.status == 404
    assert "compaction" in compact.error["message"]


def test_a_request_of_clients_of_local_servers(api: ApiPool) -> None:
    """Fields of many servers at once: what is honored reaches the worker, what is not is named, at every depth."""
    messages = [
        {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [{"function": {"name": "f"}}],
        },
        {"role": "tool", "content": []},
    ]
    answer = api.chat(
        messages=messages,
        tools=[{"name": "f", "input_schema": {"type": "object", "properties": None}}, {"type": "web_search"}],
        tool_choice={"type": "auto"},
        max_tokens=-1,
        repeat_penalty=1.1,
        ignore_eos=True,
        thinking={"type": "enabled", "budget_tokens": 9},
        store=True,
        keep_alive="5m",
    )
    assert answer.status == 200
    assert (
        answer.headers["x-ignored-parameters"]
        == "keep_alive, messages[0].cache_control, store, tools[1], thinking"
    )
    job = api.worker.jobs[-1]
    assert (job.max_tokens, job.max_reasoning_tokens) == (None, 9)
    assert (job.sampling.repetition_penalty, job.sampling.ignore_eos) == (1.1, True)


def test_usage_in_each_chunk(api: ApiPool) -> None:
    """`continuous_usage_stats`, which load generators ask for: one more completion token with each chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = api.chat(stream=True, stream_options=options)
    frames = answer.body.decode().split("\n\n")
    chunks = [json.loads(line[line.index("data: ") + 6 :]) for line in frames if "data: {" in line]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"] is not None]
    assert counts == [1, 2, 3, 4, 5, 6, 6, 6]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks if chunk["usage"] is not None} == {7}


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
def test_completions_with_and_without_v1(api: ApiPool, path: str) -> None:
    """`/v1` may be left out."""
    answer = api.ask("POST", path, b'{"prompt":"hi"}', content_type="application/json")
    assert (answer.status, answer.json["choices"][0]["text"]) == (200, "".join(WORDS))


@pytest.mark.parametrize(
    "path", ["/v1/models/org/fake:%201", "/v1/models/org%2Ffake:%201", "/models/org%2ffake%3A%201"]
)
def test_a_model_by_its_path(api: ApiPool, path: str) -> None:
    """A slash in a model id may be sent as it is or percent-encoded."""
    answer = api.ask("GET", path)
    assert (answer.status, answer.json["id"], answer.json["object"]) == (200, MODEL, "model")
    assert answer.json["context_length"] == 4096


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models", "/v1/models/org/fake:%201", "/health", "/livez", "/readyz"]
)
def test_head_is_like_get(api: ApiPool, path: str) -> None:
    """Each GET returns JSON; its HEAD has the same headers and no body."""
    got, head = api.ask("GET", path), api.ask("HEAD", path)
    assert (got.status, head.status) == (200, 200)
    assert got.headers["content-type"] == head.headers["content-type"] == "application/json"
    assert head.headers["content-length"] == str(len(got.body))
    assert got.json


def test_health(api: ApiPool) -> None:
    """`/health` counts models and workers."""
    health = api.ask("GET", "/health").json
    assert (health["status"], health["redis"], health["models"], health["workers"]) == ("ok", True, 1, 1)
    assert (health["running_requests"], health["open_requests"]) == (0, 0)


@pytest.mark.parametrize(
    "path", ["/v2", "/v1/nothing", "/v1/chat", "/v2/models", "/v1/chat/completions/x", "/%ff"]
)
def test_an_unknown_path(api: ApiPool, path: str) -> None:
    """404 in OpenAI's error format."""
    answer = api.ask("GET", path)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (
        404,
        "invalid_request_error",
        None,
    )


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/models/x", "GET"),
        ("POST", "/livez", "GET"),
        ("BREW", "/v1/completions", "POST"),
    ],
)
def test_a_wrong_method(api: ApiPool, method: str, path: str, allowed: str) -> None:
    """405 in OpenAI's error format, with the allowed methods."""
    answer = api.ask(method, path)
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")
    assert allowed in answer.headers["allow"].split(", ")


def test_request_ids(api: ApiPool) -> None:
    """A well-formed id of the client is kept; otherwise each response, errors included, has a new one."""
    assert api.ask("GET", "/health", x_request_id="abc-1.2").headers["x-request-id"] == "abc-1.2"
    ids = [
        api.ask("GET", path, **headers).headers["x-request-id"]
        for path, headers in [
            ("/health", {}),
            ("/nothing", {}),
            ("/health", {"x_request_id": "a b"}),
            ("/health", {"x_request_id": "x" * 500}),
        ]
    ]
    ids += [api.chat().headers["x-request-id"], api.chat(stream=True).headers["x-request-id"]]
    assert len(set(ids)) == 6
    assert all(id_.startswith("req_") for id_ in ids)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/x/y", "/v1/completions", "/health", "/livez", "/readyz"]
)
def test_options(api: ApiPool, path: str) -> None:
    """Each route lists its methods."""
    answer = api.ask("OPTIONS", path)
    assert answer.status == 200
    assert answer.headers["allow"]


def test_one_connection_for_many_requests(api: ApiPool) -> None:
    """Plain, streamed and refused requests, one after another and pipelined."""
    wrong = request("POST", "/v1/chat/completions", chat_body(temperature=5))
    good = request("POST", "/v1/chat/completions", chat_body(stream=True))
    with api.connect() as connection:
        for sent, status in [(good, 200), (wrong, 400), (request("GET", "/nothing"), 404), (good, 200)]:
            connection.sendall(sent)
            assert read_response(connection).status == status
    with api.connect() as connection:
        connection.sendall(good + wrong)
        data = b""
        while b"HTTP/1.1 400" not in data:
            data += connection.recv(65536)
        assert data.startswith(b"HTTP/1.1 200")
        assert data.index(b"data: [DONE]") < data.index(b"HTTP/1.1 400")


def test_the_models_name_is_echoed(api: ApiPool) -> None:
    """The name in the request, or the model's own if the request has none."""
    assert api.chat(model=MODEL).json["model"] == MODEL
    assert api.chat(model="default_model").json["model"] == "default_model"
    assert api.chat().json["model"] == MODEL
    assert api.chat(model=None).json["model"] == MODEL


@pytest.mark.parametrize("target", ["/v1/models?%ff=%fe", "/health?a&&=;", "/v1/models?" + "a" * 5000])
def test_odd_queries_change_nothing(api: ApiPool, target: str) -> None:
    """No endpoint reads a query string, malformed ones included."""
    with api.connect() as connection:
        connection.sendall(request("GET", target))
        assert read_response(connection).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health?x=\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    ],
    ids=["line", "bytes", "header", "length", "long line", "long header"],
)
def test_what_is_not_http(api: ApiPool, sent: bytes, status: int) -> None:
    """Refused before the app is called, in OpenAI's error format."""
    with api.connect() as connection:
        connection.sendall(sent)
        answer = read_response(connection)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert answer.headers["x-request-id"]


def test_aliases() -> None:
    """An alias serves its model, and the answer names that; `/v1/models` lists the plain ones and finds any."""
    environ = {"MLXPOOL_MODEL_ALIASES": f"fast={MODEL},claude-*={MODEL}", "MLXPOOL_THINKING_BUDGET": "50"}
    with api_pool(environ) as api:
        for alias in ("fast", "claude-opus-4", "default"):
            assert api.chat(model=alias).json["model"] == MODEL
        listed = api.ask("GET", "/v1/models").json["data"]
        assert [(each["id"], each["root"]) for each in listed] == [(MODEL, MODEL), ("fast", MODEL)]
        found = api.ask("GET", "/v1/models/claude-x").json
        assert (found["id"], found["root"]) == ("claude-x", MODEL)
        assert {job.max_reasoning_tokens for job in api.worker.jobs} == {50}
        unknown = api.chat(model="gpt")
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


def test_what_a_model_says_of_itself(api: ApiPool) -> None:
    """The context and the vocabulary under the names that clients of several servers read."""
    [model] = api.ask("GET", "/v1/models").json["data"]
    assert model["max_model_len"] == model["max_context_length"] == model["context_length"] == 4096
    assert model["meta"] == {"n_ctx": 4096, "n_vocab": 1000}
    assert model["sampling_defaults"] == {"temperature": 0.25, "top_k": 7}


def test_a_models_sampling_defaults(api: ApiPool) -> None:
    """They hold where a request is silent, and nowhere else."""
    api.chat()
    api.chat(temperature=1.5, top_k=0)
    api.chat(top_p=0)
    used = [(job.sampling.temperature, job.sampling.top_k) for job in api.worker.jobs]
    assert used == [(0.25, 7), (1.5, 0), (0.0, 7)]


def test_a_strict_api_with_a_default_model() -> None:
    """Unknown fields are a 400, and the default model is looked for even if it has no worker."""
    environ = {"MLXPOOL_STRICT_PARAMETERS": "1", "MLXPOOL_DEFAULT_MODEL": "not there"}
    with api_pool(environ) as api:
        refused = api.chat(model=MODEL, zzz=1)
        assert (refused.status, refused.error["param"]) == (400, "zzz")
        assert refused.error["code"] == "unknown_parameter"
        assert refused.error["message"] == "Unknown parameter: `zzz`."
        budget = api.chat(model=MODEL, thinking_budget=5)  # the model does not reason
        assert (budget.status, budget.error["param"]) == (400, "thinking_budget")
        assert (budget.error["code"], budget.error["message"]) == (
            "unknown_parameter",
            "`thinking_budget` has no effect here.",
        )
        item = {"role": "user", "content": "hi", "zzz": 1}
        nested = api.ask("POST", "/v1/responses", json.dumps({"model": MODEL, "input": [item]}).encode())
        assert nested.error["message"] == "Unknown parameter: `input[0].zzz`."
        unserved = api.chat()
        assert (unserved.status, unserved.error["code"]) == (503, "model_unavailable")
        assert int(unserved.headers["retry-after"]) >= 1


def test_a_websocket_is_refused(api: ApiPool) -> None:
    """403 on any path, and the server keeps running."""
    upgrade = {"upgrade": "websocket", "connection": "Upgrade", "sec_websocket_version": "13"}
    response = api.ask("GET", "/v1/models", sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==", **upgrade)
    assert response.status == 403
    assert api.ask("GET", "/v1/models").status == 200
