"""Thousands of nearly valid bodies at a pool: none may be answered 5xx, none may leave anything behind.

`python -m bench.fuzz --requests 10000` starts a private pool with the synthetic worker and prints what it counted by
status. Each body's answer is held against the server's own description (`/openapi.json`): what is accepted has to be
described as valid, what is refused has to name a field that the description faults. `tests/e2e` does the same, shorter.
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
from bench.harness.pool import HOST, Pool
from bench.harness.table import say
from common import connections
from common.rq import JsonQueue

WAVE = 4
"""Bodies that are sent at once, each on a connection of its own that stays open."""

MAX_BATCH = 8
CONTEXT_LENGTH = 4096
IDLE_SECONDS = 15.0

_OK, _BAD_REQUEST, _NOT_FOUND = 200, 400, 404
_TIMEOUT_SECONDS = 60.0
_ROOT = re.compile(r"[^.\[]*")
_REFUSED_CODES = ("unsupported_parameter", "unsupported_content", "context_length_exceeded")
_REFUSED_WORDS = re.compile(
    r"outside of the vocabulary"  # a model's, which the description does not know
    r"|say different things"  # JSON Schema compares no two fields
    r"|expected `int[^`]*`, got `float`"  # 1.0 is an integer there
    r"|out of range"  # of thousands of digits; a number in JSON has no end
    r"|cannot fill a gap"  # a model's
    r"|at most \d+ are allowed"
    r"|`echo` and `suffix`|With `suffix`|`best_of` (cannot|must)"
    r"|Only an assistant's message"
)
_REFUSED_PLACES = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "chat_template_kwargs",
    "response_format",
)
"""What is in these refers to itself, or is a schema of which a grammar is made: rules that no schema says."""


class WrongAnswerError(AssertionError):
    """What came back must not come back."""


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: str
    data: bytes


def is_beyond_description(error: dict[str, Any]) -> bool:
    """Whether a refusal is for what a schema cannot say, or for what is said to be unsupported."""
    place = re.split(r"[.\[]", error["param"] or "")[0]
    is_known = error["code"] in _REFUSED_CODES or place in _REFUSED_PLACES
    return is_known or _REFUSED_WORDS.search(error["message"]) is not None


# -- what an answer has to be -------------------------------------------------------------------------------------------


class Judge:
    """Holds answers against the description.

    Args:
        description: The server's.
    """

    def __init__(self, description: Any) -> None:
        components = description["components"]
        self._requests = {name: _validator(name, components) for name in ("ChatBody", "CompletionBody")}
        for schema in components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # so that an answer has nothing else
        self._answers = {
            "ChatBody": (
                _validator("ChatCompletion", components),
                _validator("ChatCompletionChunk", components),
            ),
            "CompletionBody": (
                _validator("Completion", components),
                _validator("CompletionChunk", components),
            ),
        }
        self._error = _validator("ErrorBody", components)

    def check(self, body: Body, answer: Answer) -> None:
        """Raises:
        WrongAnswerError: The answer is none for this body.
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
            _expect(error["param"] == "model", "a 404 that is not the model's", answer)
        elif isinstance(value, dict):
            self._check_refused(body, value, error, answer)
        elif not isinstance(value, Unclear | None):
            _expect(error["param"] is None, "a field is named where there is none", answer)

    def _check_accepted(self, body: Body, value: Any, answer: Answer) -> None:
        _expect(isinstance(value, dict | Unclear), "a body that is no JSON object was accepted", answer)
        if isinstance(value, dict):
            faults = [f.message[:200] for f in self._requests[body.type_name].iter_errors(value)]
            _expect(not faults, f"accepted, and not as described: {faults}", answer)
        whole, chunk = self._answers[body.type_name]
        if answer.content_type == "application/json":
            _conforms(whole, _json(answer), answer)
            return
        _expect(answer.content_type.startswith("text/event-stream"), answer.content_type, answer)
        frames = [f for f in answer.data.split(b"\n\n") if f and not f.startswith(b":")]
        _expect(all(frame.startswith(b"data: ") for frame in frames), "a frame without data", answer)
        _expect(frames.pop() == b"data: [DONE]", "a stream that just stops", answer)
        for frame in frames:
            _conforms(chunk, json.loads(frame[6:]), answer)

    def _check_refused(self, body: Body, value: Any, error: dict[str, Any], answer: Answer) -> None:
        _expect(error["param"] is not None, "no field is named", answer)
        faults = list(self._requests[body.type_name].iter_errors(value))
        if is_beyond_description(error):
            return
        _expect(bool(faults), "valid by the description, and refused", answer)
        found = _ROOT.match(error["param"])
        roots = set().union(*map(_roots, faults))
        _expect(found is not None and found[0] in roots, f"at fault are {sorted(roots)}", answer)


def _validator(name: str, components: Any) -> Draft202012Validator:
    document = json.loads(json.dumps(components))
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document})


def _roots(fault: Any) -> set[str]:
    """The fields of a body that a fault in it is about."""
    if fault.absolute_path:
        return {str(fault.absolute_path[0])}
    if fault.validator == "required":
        return {name for name in fault.validator_value if name not in fault.instance}
    return set(re.findall(r'"properties": {"([^"]+)"', json.dumps(fault.schema)))


class Unclear:
    """A body on which two parsers may differ: a lone surrogate, nesting that is deep, a field that is there twice."""


def _parsed(data: bytes) -> Any:
    """The JSON value, None where it is none (or null, which is as wrong)."""
    try:
        value = json.loads(
            data.decode(), parse_constant=_no_constant, parse_int=_integer, object_pairs_hook=_object
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (RecursionError, UnicodeEncodeError, _TwiceError):
        return Unclear()
    except ValueError:
        return None
    return value


class _TwiceError(Exception):
    """An object has a field twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _TwiceError
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _integer(text: str) -> int:
    return int(text[:400])  # Python takes no more than 4,300 digits; as large all the same


def _expect(is_so: bool, otherwise: str, answer: Answer) -> None:
    if not is_so:
        raise WrongAnswerError(f"{otherwise}: {answer.status} {answer.data[:600]!r}")


def _conforms(validator: Draft202012Validator, value: Any, answer: Answer) -> None:
    faults = [f"{fault.json_path}: {fault.message[:200]}" for fault in validator.iter_errors(value)]
    _expect(not faults, f"not as described: {faults}", answer)


def _json(answer: Answer) -> Any:
    try:
        return json.loads(answer.data)
    except ValueError:
        raise WrongAnswerError(f"no JSON: {answer.data[:200]!r}") from None


# -- sending ------------------------------------------------------------------------------------------------------------


@dataclass
class Fuzz:
    """Sends bodies over connections that stay open, and counts.

    Attributes:
        statuses: Answers by status; streams apart.
        params: Refusals by the field that they name, without indices.
        num_connections: Opened so far; few, since a refusal is no reason to close one.
    """

    port: int
    statuses: Counter[str] = field(default_factory=Counter)
    params: Counter[str] = field(default_factory=Counter)
    num_connections: int = 0

    def __post_init__(self) -> None:
        self._connections: dict[int, http.client.HTTPConnection] = {}
        self._judge = Judge(json.loads(self.get("/openapi.json")))

    def run(self, num_requests: int, *, is_repeatable: bool = False) -> None:
        """Send about so many.

        Args:
            is_repeatable: The same bodies each time.

        Raises:
            WrongAnswerError: With the smallest body that Hypothesis could find for it.
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
        """Send all, then read all answers and check them."""
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
        """A GET's body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def close(self) -> None:
        """End the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def left_behind(self, redis_url: str, model: str = MODEL) -> Iterator[str]:
        """What a pool that nobody uses must not have: requests in the API, jobs in the queue or with a worker."""
        if num := json.loads(self.get("/health"))["open_requests"]:
            yield f"{num} requests run"
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


# -- the long form ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Send, count and look at what is left; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    options = parser.parse_args(argv)
    with Pool() as pool:
        command = ["bench.harness.synthetic_worker", "--name", MODEL, "--max-batch", str(MAX_BATCH)]
        command += ["--context-length", str(CONTEXT_LENGTH), "--log-level", "WARNING"]
        pool.start_worker(command, MODEL)
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
    """What is left once the last answers' books are written."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        [model] = json.loads(fuzz.get("/v1/models"))["data"] or [{"free_slots": 0}]
        left = list(fuzz.left_behind(pool.redis_url))
        if model["free_slots"] != MAX_BATCH:
            left.append(f"{MAX_BATCH - model['free_slots']} slots")
        if pool.process("worker").poll() is not None:
            left.append("a dead worker")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
