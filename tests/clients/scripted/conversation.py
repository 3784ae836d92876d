"""What a script sees of a job, and what it answers: a `Conversation` in, an `Answer` out.

A script is a pure function, so that a worker that takes a job over computes the same answer. `encode_answer` writes the answer
in the format that the job's parser and grammar expect. Independent of MLX.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.protocol import ChatPrompt, GenerationJob
from common.schema.grammar import CALL_BEGIN, CALL_END


class ScriptError(Exception):
    """The conversation is not the one that the script expects; the message says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: the function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A call in the history, and its result."""

    call: Call
    result: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says next.

    Attributes:
        name: Of the step, for the record.
        text: The content before the calls, or the only content.
    """

    name: str
    text: str
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a job and the functions that it offers.

    Attributes:
        messages: As in the job: roles, contents as strings, `tool_calls`.
        functions: By name: the schema of the parameters.
    """

    messages: list[dict[str, Any]]
    functions: dict[str, dict[str, Any]]
    has_grammar: bool = False

    @classmethod
    def from_job(cls, job: GenerationJob) -> Conversation:
        """Read a job.

        Raises:
            ScriptError: It is not a chat.
        """
        if not isinstance(job.prompt, ChatPrompt):
            raise ScriptError("a script answers chats only")
        tools = [tool["function"] for tool in job.tool_use.tools] if job.tool_use else []
        functions = {tool["name"]: tool.get("parameters") or {} for tool in tools}
        return cls(job.prompt.messages, functions, has_grammar=job.grammar is not None)

    @property
    def calls(self) -> list[MadeCall]:
        """All calls in the history, in order.

        Raises:
            ScriptError: A call has no result, or a result has no call.
        """
        made = [call for message in self.messages for call in message.get("tool_calls") or []]
        results = {
            m.get("tool_call_id"): str(m.get("content") or "") for m in self.messages if m["role"] == "tool"
        }
        num_results = sum(m["role"] == "tool" for m in self.messages)
        if [call.get("id") for call in made] != list(results) or num_results != len(results):
            raise ScriptError(f"the results of {list(results)} do not match the calls {made}")
        return [MadeCall(_to_call(call["function"]), results[call["id"]]) for call in made]

    def text_of(self, role: str) -> str:
        """All contents of one role."""
        return "\n".join(str(m.get("content") or "") for m in self.messages if m["role"] == role)


Script = Callable[[Conversation], Answer]


def encode_answer(answer: Answer, functions: dict[str, dict[str, Any]]) -> str:
    """The answer as the model would write it. A grammar requires arguments in the order of the schema's properties."""
    calls = []
    for call in answer.calls:
        order = list(functions[call.name].get("properties") or {})
        names = sorted(call.arguments, key=order.index)
        written = {"name": call.name, "arguments": {name: call.arguments[name] for name in names}}
        calls.append(f"{CALL_BEGIN}{json.dumps(written, ensure_ascii=False)}{CALL_END}")
    return "\n".join([answer.text, *calls] if answer.text else calls)


def _to_call(function: dict[str, Any]) -> Call:
    arguments = function["arguments"]
    return Call(function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)
