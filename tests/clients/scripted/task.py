"""The script of a coding task: list the files, read one, edit it, run its test, report.

The step follows from the results in the conversation alone. The script also checks the history that the agent sends back: every
call exactly once and as it was made, with the text before it, and every result with what its call produces. `SOURCE` and
`TEST` are the files of the repository. Pure.
"""

from __future__ import annotations

import re
from typing import Final

from tests.clients.scripted.conversation import Answer, Call, Conversation, MadeCall, ScriptError
from tests.clients.scripted.tools import Toolbox

SOURCE_NAME: Final = "calc.py"
TEST_NAME: Final = "check_calc.py"
WRONG_LINE: Final = "    return a - b  # TODO"
RIGHT_LINE: Final = "    return a + b"
SOURCE: Final = f'def add(a, b):\n    """The sum of a and b."""\n{WRONG_LINE}\n'
TEST: Final = """from pathlib import Path

from calc import add

with Path(__file__).with_name("runs.log").open("a") as log:
    log.write("run\\n")
assert add(2, 3) == 5, add(2, 3)
print("PASSED with code", 7 * 6 * 1000 + add(2, 3))
"""
PASSED: Final = "PASSED with code 42005"
REPORT: Final = "The function add now returns the sum. Its test printed: "

_TASK = re.compile(r"The function add in the repository (\S+) is wrong")
_DISTURBED: Final = " If the connection breaks, try again."
_ABORTED: Final = "Tool execution aborted"
"""The result that OpenCode sends for a call whose stream broke; it keeps the fragment and asks again."""
_TITLE: Final = "Fix the function add"


def task(repository: str, *, is_disturbed: bool = False) -> str:
    """The user's message.

    Args:
        is_disturbed: Connections will break: agents may then keep fragments of an answer, and ask again.
    """
    return (
        f"The function add in the repository {repository} is wrong. List the files, read {SOURCE_NAME}, correct it, "
        f"run {TEST_NAME} and report what it printed.{_DISTURBED if is_disturbed else ''}"
    )


def answer(conversation: Conversation) -> Answer:
    """The script; see the module.

    Raises:
        ScriptError: The conversation is not one of this task's.
    """
    found = _TASK.search(conversation.text_of("user"))
    if found is None or not Toolbox(conversation.functions).has_shell:
        return _answer_side_request(conversation)
    steps = _steps(Toolbox(conversation.functions), found[1])
    made = conversation.calls
    is_disturbed = _DISTURBED in conversation.text_of("user")
    completed = [each for each in made if not (is_disturbed and _ABORTED in each.result)]
    _check_calls(completed, steps)
    _check_texts(conversation.text_of("assistant"), steps[: len(completed)], 2 if is_disturbed else 1)
    if len(completed) < len(steps):
        return steps[len(completed)]
    if PASSED not in completed[-1].result:
        raise ScriptError(f"the test did not pass: {completed[-1].result[:500]}")
    return Answer("report", f"{REPORT}{PASSED}")


def _answer_side_request(conversation: Conversation) -> Answer:
    """Agents also ask for a title or a summary, with no tools or few."""
    if conversation.has_grammar:
        return Answer("title", f'{{"title": "{_TITLE}"}}')
    return Answer("title", _TITLE)


def _steps(tools: Toolbox, repository: str) -> list[Answer]:
    """The answers before the report, each with one call. The text before a call is long enough for a kill in its middle."""
    source = f"{repository}/{SOURCE_NAME}"

    def step(name: str, text: str, call: Call) -> Answer:
        return Answer(name, text, [call])

    return [
        step(
            "list",
            "Let me first look at the files of the repository, to see where the function is and which test it has.",
            tools.list_files(repository),
        ),
        step(
            "read",
            f"There is {SOURCE_NAME}, which must contain the function, and {TEST_NAME}. I read the source before I "
            "change anything.",
            tools.read(source),
        ),
        step(
            "edit",
            "The function subtracts its second argument from the first, although its docstring promises the sum of "
            "both. I replace that one line and leave everything else as it is.",
            tools.edit(source, WRONG_LINE, RIGHT_LINE),
        ),
        step(
            "test",
            "Now I run the test, which prints a code if the function returns the sum of its arguments.",
            tools.run(f"python3 {repository}/{TEST_NAME}"),
        ),
    ]


_EXPECTED_IN_RESULT: Final = {"list": TEST_NAME, "read": "return a - b"}


def _check_calls(made: list[MadeCall], steps: list[Answer]) -> None:
    """Compare the calls of the history with the steps.

    Raises:
        ScriptError: A call is missing, repeated or changed, or a result is not what its call produces.
    """
    if len(made) > len(steps):
        raise ScriptError(f"{len(made)} calls for {len(steps)} steps")
    for each, step in zip(made, steps, strict=False):
        if [each.call] != step.calls:
            raise ScriptError(f"the call of step {step.name!r} came back as {each.call}, not {step.calls[0]}")
        expected = _EXPECTED_IN_RESULT.get(step.name, "")
        if expected not in each.result:
            raise ScriptError(f"the result of step {step.name!r} lacks {expected!r}: {each.result[:500]}")


def _check_texts(said: str, steps: list[Answer], max_times: int) -> None:
    """Look for the text before each call.

    Raises:
        ScriptError: It is missing, or comes more often than `max_times`.
    """
    for step in steps:
        if not 1 <= said.count(step.text) <= max_times:
            raise ScriptError(f"the text of step {step.name!r} came back {said.count(step.text)} times")
