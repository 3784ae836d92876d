"""The script of the coding agents' task, and the engine that follows it (tests/clients/scripted)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.scripted import task
from tests.clients.scripted.conversation import Answer, Conversation, ScriptError, encode_answer
from tests.clients.scripted.engine import ScriptedEngine
from worker.loop.engine import Engine


def schema(*names: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {} for name in names}, "required": list(required)}


AGENTS = {
    "claude": {
        "Bash": schema("command", "timeout", "description", required=("command",)),
        "Read": schema("file_path", "offset", required=("file_path",)),
        "Edit": schema("file_path", "old_string", "new_string", "replace_all", required=("file_path",)),
    },
    "opencode": {
        "bash": schema("command", "description", required=("command",)),
        "read": schema("filePath", required=("filePath",)),
        "edit": schema("filePath", "oldString", "newString", required=("filePath",)),
    },
    "qwen": {
        "run_shell_command": schema("command", "is_background", required=("command",)),
        "read_file": schema("file_path", required=("file_path",)),
        "edit": schema("file_path", "old_string", "new_string", required=("file_path",)),
    },
    "codex": {"exec_command": schema("cmd", "workdir", required=("cmd",))},
}
RESULTS = {"list": f"calc.py {task.TEST_NAME}", "read": task.SOURCE, "edit": "done", "test": task.PASSED}


def conversation(agent: str, messages: list[dict[str, Any]], *, is_disturbed: bool = False) -> Conversation:
    user = {"role": "user", "content": task.task("/repository", is_disturbed=is_disturbed)}
    return Conversation([user, *messages], AGENTS[agent])


def turn(answer: Answer, call_id: str, result: str) -> list[dict[str, Any]]:
    """The messages that an agent adds after an answer: the answer itself, and the result of its call."""
    [call] = answer.calls
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": answer.text, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call_id, "content": result},
    ]


@pytest.mark.parametrize("agent", AGENTS)
def test_steps(agent: str) -> None:
    """With each agent's tools, the script goes through all steps and reports what the test printed."""
    messages: list[dict[str, Any]] = []
    names = []
    while (answer := task.answer(conversation(agent, messages))).calls:
        names.append(answer.name)
        messages += turn(answer, f"call_{len(names)}", RESULTS[answer.name])
    assert names == ["list", "read", "edit", "test"]
    assert answer.text == f"{task.REPORT}{task.PASSED}"


def test_history_is_checked() -> None:
    """A call that comes back twice or changed, a result that is missing or wrong, and a missing text are refused."""
    first = task.answer(conversation("claude", []))
    good = turn(first, "call_1", RESULTS["list"])
    renamed = json.loads(json.dumps(good).replace("ls ", "ls -a "))
    cases = {
        "came back as": renamed,
        "do not match": good[:1],
        "lacks": turn(first, "call_1", "nothing"),
        "0 times": [good[0] | {"content": ""}, good[1]],
        "2 times": [{"role": "assistant", "content": first.text}, *good],
    }
    for message, messages in cases.items():
        with pytest.raises(ScriptError, match=message):
            task.answer(conversation("claude", messages))
    with pytest.raises(ScriptError, match="came back as"):  # as the second step's
        task.answer(conversation("claude", [*good, *turn(first, "call_2", RESULTS["list"])]))


def test_fragments_are_allowed_only_if_connections_break() -> None:
    """A text that was said before, and a call that the agent aborted, are an interrupted attempt in a disturbed run."""
    first = task.answer(conversation("opencode", []))
    aborted = turn(first, "call_0", "Tool execution aborted")
    messages = [*aborted, *turn(first, "call_1", RESULTS["list"])]
    assert task.answer(conversation("opencode", messages, is_disturbed=True)).name == "read"
    with pytest.raises(ScriptError):
        task.answer(conversation("opencode", messages))


def test_arguments_are_in_the_order_of_the_schema() -> None:
    """As a grammar requires."""
    functions = {"Bash": schema("description", "command")}
    answer = task.answer(Conversation([{"role": "user", "content": task.task("/r")}], functions))
    encoded = encode_answer(answer, functions)
    assert encoded.startswith(answer.text)
    assert encoded.index('"description"') < encoded.index('"command"')


def test_engine_has_every_method() -> None:
    """The scripted engine implements the loop's protocol; `info` is set when it is created."""
    names = {name for name in vars(Engine) if not name.startswith("_")}
    assert names - set(vars(ScriptedEngine)) == {"info"}
