"""Fuzzing: sends thousands of nearly valid bodies to a pool. None may cause a 5xx, and none may leave jobs behind.

`python -m bench.fuzz --requests 10000` starts a private pool with a synthetic worker and prints the responses by status. Each
response is checked against the server's OpenAPI description (`/openapi.json`): an accepted body must be valid by it, and a refusal
must name a field that is invalid by it. `tests/e2e` runs a shorter version.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from bench.fuzz.bodies import BODIES, MODEL, Body
from bench.harness.pool import HOST, Pool, synthetic_worker
from bench.harness.table import say
from common import connections
from common.rq import JsonQueue

WAVE = 4
"""Bodies that are sent concurrently, each on a persistent connection of its own."""

MAX_BATCH = 8
CONTEXT_LENGTH = 4096
IDLE_SECONDS = 15.0

BODY_TYPES = ("ChatBody", "CompletionBody", "ResponsesBody")

_OK, _BAD_REQUEST, _NOT_FOUND = 200, 400, 404
_TIMEOUT_SECONDS = 60.0
_ROOT = re.compile(r"[^.\[]*")
_REFUSED_CODES = ("unsupported_parameter", "unsupported_content", "context_length_exceeded")
_REFUSED_WORDS = re.compile(
    r"outside the model's vocabulary"  # of a model, which the description does not include
    r"|differ; set only one"  # JSON Schema cannot compare two fields
    r"|expected `int[^`]*`, got `float`"  # 1.0 is an integer in JSON Schema
    r"|out of range"  # thousands of digits; JSON does not limit a number's length
    r"|does not support `suffix`"  # of a model
    r"|at most \d+ are allowed"
    r"|`echo` cannot be combined|With `suffix`|`best_of` (cannot|must)"
    r"|Only an assistant message"
    r"|`background` needs a stored response"
    r"|set the format of the answer; set only one"
    r"|cannot both be true|asks to continue the last message"
)
_REFUSED_FIELDS = (
    "X-Resumable",  # only for a stream
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "chat_template_kwargs",
    "response_format",
    "input",
    "text",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "json_schema",
    "regex",
    "format",
    "thinking",
)
"""Fields with rules that JSON Schema cannot express: they refer to each other, or hold a schema that becomes a grammar."""


class WrongAnswerError(AssertionError):
    """A response that violates the description or the protocol."""


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: str
    data: bytes


def _without_id(frame: bytes) -> bytes:
    return frame.partition(b"\n")[2] if frame.startswith(b"id: ") else frame


def is_beyond_description(error: dict[str, Any]) -> bool:
    """Whether a refusal is for something that JSON Schema cannot express, or that is documented as unsupported."""
    if "code" not in error:  # Anthropic's; what is not of its described type has this message
        return not str(error["message"]).startswith("Invalid value for")
    root = re.split(r"[.\[]", error["param"] or "")[0]
    is_known = error["code"] in _REFUSED_CODES or root in _REFUSED_FIELDS
    return is_known or _REFUSED_WORDS.search(error["message"]) is not None


class Judge:
    """Checks responses against the OpenAPI description.

    Args:
        description: The server's `/openapi.json`.
    """

    def __init__(self, description: Any) -> None:
        components = description["components"]
        self._requests = {name: _validator(name, components) for name in BODY_TYPES}
        for schema in components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # an undocumented field is an error
        self._answers = {
            "ChatBody": (
                _validator("ChatCompletion", components),
                _validator("ChatCompletionChunk", components),
            ),
            "CompletionBody": (
                _validator("Completion", components),
                _validator("CompletionChunk", components),
            ),
            "ResponsesBody": (
                _validator("ResponseObject", components),
                _validator("ResponseEvent", components),
            ),
        }
        self._error = _validator("ErrorBody", components)

    def check(self, body: Body, answer: Answer) -> None:
        """Raises:
        WrongAnswerError: The response is not valid for this body.
        """
        value = _parsed(body.data)
        if answer.status == _OK:
            self._check_accepted(body, value, answer)
            return
        _expect(answer.status in (_BAD_REQUEST, _NOT_FOUND), f"status {answer.status}", answer)
        _expect(answer.content_type == "application/json", answer.content_type, answer)
        _conforms(self._error, _json(answer), answer)
        error = _json(answer)["error"]
        if answer.status == _NOT_FOUND:
            _expect(error["param"] == "model", "a 404 whose param is not model", answer)
        elif isinstance(value, dict):
            self._check_refused(body, value, error, answer)
        elif not isinstance(value, Ambiguous | None):
            _expect(error["param"] is None, "a param is named for a body without fields", answer)

    def _check_accepted(self, body: Body, value: Any, answer: Answer) -> None:
        _expect(isinstance(value, dict | Ambiguous), "a body that is not a JSON object was accepted", answer)
        if isinstance(value, dict):
            faults = [f.message[:200] for f in self._requests[body.type_name].iter_errors(value)]
            _expect(not faults, f"accepted, but invalid by the description: {faults}", answer)
        whole, chunk = self._answers[body.type_name]
        if answer.content_type == "application/json":
            _conforms(whole, _json(answer), answer)
            return
        _expect(answer.content_type.startswith("text/event-stream"), answer.content_type, answer)
        frames = [_without_id(f) for f in answer.data.split(b"\n\n") if f and not f.startswith(b":")]
        if body.type_name == "ResponsesBody":
            self._check_events(frames, answer)
            return
        _expect(all(frame.startswith(b"data: ") for frame in frames), "a frame without data:", answer)
        _expect(frames.pop() == b"data: [DONE]", "a stream without [DONE]", answer)
        for frame in frames:
            _conforms(chunk, json.loads(frame[6:]), answer)

    def _check_events(self, frames: list[bytes], answer: Answer) -> None:
        """Frames with a name, in order; the last one has the complete response."""
        whole, event_schema = self._answers["ResponsesBody"]
        event: Any = None
        for i, frame in enumerate(frames):
            lines = [line for line in frame.split(b"\n") if not line.startswith(b"id: ")]
            _expect(len(lines) == 2, "a frame that is not a name and its data", answer)  # noqa: PLR2004
            event = json.loads(lines[1].removeprefix(b"data: "))
            _expect(lines[0] == b"event: " + event["type"].encode(), "a wrong name", answer)
            _expect(event["sequence_number"] == i, "a wrong number", answer)
            _conforms(event_schema, event, answer)
        _expect(event is not None and "response" in event, "a stream without an end", answer)
        _conforms(whole, event["response"], answer)

    def _check_refused(self, body: Body, value: Any, error: dict[str, Any], answer: Answer) -> None:
        _expect(error["param"] is not None, "no param is named", answer)
        faults = list(self._requests[body.type_name].iter_errors(value))
        if is_beyond_description(error):
            return
        _expect(bool(faults), "valid by the description, but refused", answer)
        found = _ROOT.match(error["param"])
        roots = set().union(*map(_roots, faults))
        _expect(found is not None and found[0] in roots, f"the invalid fields are {sorted(roots)}", answer)


def _validator(name: str, components: Any) -> Draft202012Validator:
    document = json.loads(json.dumps(components))
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document})


def _roots(fault: Any) -> set[str]:
    """The top-level fields that a validation error is about."""
    if fault.absolute_path:
        return {str(fault.absolute_path[0])}
    if fault.validator == "required":
        return {name for name in fault.validator_value if name not in fault.instance}
    return set(re.findall(r'"properties": {"([^"]+)"', json.dumps(fault.schema)))


class Ambiguous:
    """A body that parsers may read differently: a lone surrogate, deep nesting, a duplicate field."""


def _parsed(data: bytes) -> Any:
    """The JSON value; None if it is invalid JSON (or null, which is just as invalid as a body)."""
    try:
        value = json.loads(
            data.decode(), parse_constant=_no_constant, parse_int=_integer, object_pairs_hook=_object
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (RecursionError, UnicodeEncodeError, _DuplicateError):
        return Ambiguous()
    except ValueError:
        return None
    return value


class _DuplicateError(Exception):
    """An object has a duplicate field."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateError
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _integer(text: str) -> int:
    return int(text[:400])  # Python parses at most 4,300 digits; 400 are as far out of range


def _expect(is_true: bool, otherwise: str, answer: Answer) -> None:
    if not is_true:
        raise WrongAnswerError(f"{otherwise}: {answer.status} {answer.data[:600]!r}")


def _conforms(validator: Draft202012Validator, value: Any, answer: Answer) -> None:
    faults = [f"{fault.json_path}: {fault.message[:200]}" for fault in validator.iter_errors(value)]
    _expect(not faults, f"not as described: {faults}", answer)


def _json(answer: Answer) -> Any:
    try:
        return json.loads(answer.data)
    except ValueError:
        raise WrongAnswerError(f"not JSON: {answer.data[:200]!r}") from None


@dataclass
class Fuzz:
    """Sends bodies over persistent connections, and counts responses.

    Attributes:
        statuses: Responses by status; streams are counted separately.
        params: Refusals by the param that they name, without indices.
        num_connections: Opened so far; few, since a refusal does not close the connection.
    """

    port: int
    statuses: Counter[str] = field(default_factory=Counter)
    params: Counter[str] = field(default_factory=Counter)
    num_connections: int = 0

    def __post_init__(self) -> None:
        self._connections: dict[int, http.client.HTTPConnection] = {}
        self._judge = Judge(json.loads(self.get("/openapi.json")))

    def run(self, num_requests: int, *, is_repeatable: bool = False) -> None:
        """Send about `num_requests` bodies.

        Args:
            is_repeatable: Send the same bodies each time.

        Raises:
            WrongAnswerError: With the smallest failing body that Hypothesis found.
        """

        @settings(
            max_examples=max(1, num_requests // WAVE),
            deadline=None,
            database=None,
            derandomize=is_repeatable,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(BODIES, min_size=WAVE, max_size=WAVE))
        def send(bodies: list[Body]) -> None:
            self.send(bodies)

        try:
            send()
        finally:
            self.close()

    def send(self, bodies: list[Body]) -> None:
        """Send all bodies, then read and check all responses."""
        for i, body in enumerate(bodies):
            self._connection(i).request("POST", body.path, body.data, {"content-type": "application/json"})
        answers = [self._read(i) for i in range(len(bodies))]
        for body, answer in zip(bodies, answers, strict=True):
            kind = " stream" if answer.content_type.startswith("text/event-stream") else ""
            self.statuses[f"{answer.status}{kind}"] += 1
            self._judge.check(body, answer)
            if answer.status != _OK:
                param = _json(answer)["error"]["param"]
                self.params[re.sub(r"\[\d+\]", "[]", str(param))] += 1

    def get(self, path: str) -> bytes:
        """The body of a GET response."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def left_behind(self, redis_url: str, model: str = MODEL) -> Iterator[str]:
        """What an idle pool must not have: requests in the API, jobs in the queue or at a worker."""
        if num := json.loads(self.get("/health"))["open_requests"]:
            yield f"{num} requests are running"
        with connections.connect(redis_url) as client:
            queue = JsonQueue(model, connection=client)
            for name, num in (
                ("queued", queue.count),
                ("being taken", client.llen(queue.intermediate_queue_key)),
                ("started", queue.started_job_registry.count),
            ):
                if num:
                    yield f"{num} jobs {name}"

    def _connection(self, i: int) -> http.client.HTTPConnection:
        if i not in self._connections:
            self._connections[i] = http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT_SECONDS)
        if self._connections[i].sock is None:
            self.num_connections += 1
        return self._connections[i]

    def _read(self, i: int) -> Answer:
        response = self._connections[i].getresponse()
        return Answer(response.status, response.headers["content-type"], response.read())


def main(argv: list[str] | None = None) -> int:
    """Send bodies, print counts and check that nothing is left; the exit status is 1 if something is."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    options = parser.parse_args(argv)
    with Pool() as pool:
        context = ("--context-length", str(CONTEXT_LENGTH))
        pool.start_worker(synthetic_worker(MODEL, MAX_BATCH, *context), MODEL)
        pool.start_api()
        fuzz, began_at = Fuzz(pool.port), time.monotonic()
        try:
            fuzz.run(options.requests)
        finally:
            seconds = time.monotonic() - began_at
            say(f"{fuzz.statuses.total()} bodies in {seconds:.0f} s, {fuzz.num_connections} connections")
            say(
                "by status: "
                + ", ".join(f"{num} × {status}" for status, num in sorted(fuzz.statuses.items()))
            )
            say("refused for: " + ", ".join(f"{num} × {param}" for param, num in fuzz.params.most_common()))
        left = _left(fuzz, pool)
        say(f"left behind: {', '.join(left) or 'nothing'}")
    return 1 if left else 0


def _left(fuzz: Fuzz, pool: Pool) -> list[str]:
    """What is left behind once RQ's bookkeeping of the last jobs is done."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        [model] = json.loads(fuzz.get("/v1/models"))["data"] or [{"free_slots": 0}]
        left = list(fuzz.left_behind(pool.redis_url))
        if model["free_slots"] != MAX_BATCH:
            left.append(f"{MAX_BATCH - model['free_slots']} slots")
        if pool.process("worker").poll() is not None:
            left.append("a worker that died")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
