"""Checks each response of a fuzzed pool against its OpenAPI description, `/openapi.json`.

An accepted body must be valid by it, a refusal must name a field that is invalid by it, and each answer, event and error must be as
described. Used by `bench.fuzz.fuzzer` and by the hooks of schemathesis.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

from bench.fuzz.bodies import Body
from bench.fuzz.protocols import PROTOCOLS

OK = 200
_BAD_REQUEST, _NOT_FOUND = 400, 404
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
    r"|is only allowed with `stream=true`|is not the id of an item of this response"
    r"|Only a response with `background: true` can be cancelled"
    r"|set the format of the answer; set only one"
    r"|^The synthetic worker only counts"
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
        is_described = str(error["message"]).startswith("Invalid value for")
        return not is_described or _REFUSED_WORDS.search(error["message"]) is not None
    root = re.split(r"[.\[]", error["param"] or "")[0]
    is_known = error["code"] in _REFUSED_CODES or root in _REFUSED_FIELDS
    return is_known or _REFUSED_WORDS.search(error["message"]) is not None


class Judge:
    """Checks responses against the OpenAPI description.

    Args:
        description: The server's `/openapi.json`.
    """

    def __init__(self, description: Any) -> None:
        self._components = description["components"]
        self._requests = {name: self._one_of(each.request) for name, each in PROTOCOLS.items()}
        for schema in self._components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # an undocumented field is an error
        self._answers = {name: self._one_of((each.answer,)) for name, each in PROTOCOLS.items()}
        self._events = {name: self._one_of(each.events) for name, each in PROTOCOLS.items() if each.events}
        self._errors = {name: self._one_of((each.error,)) for name, each in PROTOCOLS.items()}

    def _one_of(self, names: tuple[str, ...]) -> Draft202012Validator:
        components = json.loads(json.dumps(self._components))
        references = [{"$ref": f"#/components/schemas/{name}"} for name in names]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        return Draft202012Validator({**schema, "components": components})

    def check(self, body: Body, answer: Answer) -> None:
        """Raises:
        WrongAnswerError: The response is not valid for this body.
        """
        value = parsed(body.data)
        if answer.status == OK:
            self._check_accepted(body, value, answer)
            return
        expect(answer.status in (_BAD_REQUEST, _NOT_FOUND), f"status {answer.status}", answer)
        expect(answer.content_type == "application/json", answer.content_type, answer)
        _conforms(self._errors[body.type_name], as_json(answer), answer)
        error = as_json(answer)["error"]
        if not PROTOCOLS[body.type_name].names_param:
            self._check_message(body, value, error, answer)
        elif answer.status == _NOT_FOUND:
            expect(error["param"] == "model", "a 404 whose param is not model", answer)
        elif isinstance(value, dict):
            self._check_refused(body, value, error, answer)
        elif not isinstance(value, Ambiguous | None):
            expect(error["param"] is None, "a param is named for a body without fields", answer)

    def _check_accepted(self, body: Body, value: Any, answer: Answer) -> None:
        expect(isinstance(value, dict | Ambiguous), "a body that is not a JSON object was accepted", answer)
        if isinstance(value, dict):
            faults = [f.message[:200] for f in self._requests[body.type_name].iter_errors(value)]
            expect(not faults, f"accepted, but invalid by the description: {faults}", answer)
        if answer.content_type == "application/json":
            _conforms(self._answers[body.type_name], as_json(answer), answer)
            return
        expect(answer.content_type.startswith("text/event-stream"), answer.content_type, answer)
        protocol = PROTOCOLS[body.type_name]
        frames = [_without_id(f) for f in answer.data.split(b"\n\n") if f and not f.startswith(b":")]
        if protocol.stream == "events":
            self._check_events(body, frames, answer)
            return
        expect(all(frame.startswith(b"data: ") for frame in frames), "a frame without data:", answer)
        expect(frames.pop() == b"data: [DONE]", "a stream without [DONE]", answer)
        for frame in frames:
            _conforms(self._events[body.type_name], json.loads(frame[6:]), answer)

    def _check_events(self, body: Body, frames: list[bytes], answer: Answer) -> None:
        """Frames with a name, in order. The last one of a response has all of it."""
        event: Any = None
        for i, frame in enumerate(frames):
            lines = frame.split(b"\n")
            expect(len(lines) == 2, "a frame that is not a name and its data", answer)  # noqa: PLR2004
            event = json.loads(lines[1].removeprefix(b"data: "))
            expect(lines[0] == b"event: " + event["type"].encode(), "a wrong name", answer)
            expect(event.get("sequence_number", i) == i, "a wrong number", answer)
            _conforms(self._events[body.type_name], event, answer)
        expect(event is not None, "a stream without events", answer)
        if body.type_name == "MessagesBody":
            expect(event["type"] == "message_stop", "a stream without an end", answer)
            return
        expect("response" in event, "a stream without an end", answer)
        _conforms(self._answers[body.type_name], event["response"], answer)

    def _check_refused(self, body: Body, value: Any, error: dict[str, Any], answer: Answer) -> None:
        if is_beyond_description(error):
            return
        expect(error["param"] is not None, "no param is named", answer)
        faults = list(self._requests[body.type_name].iter_errors(value))
        expect(bool(faults), "valid by the description, but refused", answer)
        found = _ROOT.match(error["param"])
        roots = set().union(*map(_roots, faults))
        expect(found is not None and found[0] in roots, f"the invalid fields are {sorted(roots)}", answer)

    def _check_message(self, body: Body, value: Any, error: dict[str, Any], answer: Answer) -> None:
        """An error without `param`; its message names the field."""
        if answer.status == _NOT_FOUND or not isinstance(value, dict) or is_beyond_description(error):
            return
        faults = list(self._requests[body.type_name].iter_errors(value))
        expect(bool(faults), "valid by the description, but refused", answer)
        roots = set().union(*map(_roots, faults))
        expect(
            any(root in error["message"] for root in roots), f"the invalid fields are {sorted(roots)}", answer
        )


def _roots(fault: Any) -> set[str]:
    """The top-level fields that a validation error is about."""
    if fault.validator == "anyOf" and not fault.absolute_path:
        return set().union(*map(_roots, fault.context))
    if fault.absolute_path:
        return {str(fault.absolute_path[0])}
    if fault.validator == "required":
        return {name for name in fault.validator_value if name not in fault.instance}
    return set(re.findall(r'"properties": {"([^"]+)"', json.dumps(fault.schema)))


class Ambiguous:
    """A body that parsers may read differently: a lone surrogate, deep nesting, a duplicate field."""


def parsed(data: bytes) -> Any:
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


def expect(is_true: bool, otherwise: str, answer: Answer) -> None:
    if not is_true:
        raise WrongAnswerError(f"{otherwise}: {answer.status} {answer.data[:600]!r}")


def _conforms(validator: Draft202012Validator, value: Any, answer: Answer) -> None:
    faults = [f"{fault.json_path}: {fault.message[:200]}" for fault in validator.iter_errors(value)]
    expect(not faults, f"not as described: {faults}", answer)


def as_json(answer: Answer) -> Any:
    try:
        return json.loads(answer.data)
    except ValueError:
        raise WrongAnswerError(f"not JSON: {answer.data[:200]!r}") from None
