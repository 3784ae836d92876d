"""The system message that describes tools to a model without a format of its own."""

from __future__ import annotations

from common.protocol import ToolUse
from worker.text.templates.tool_messages import instructions


def test_instructions_have_no_example_of_arguments() -> None:
    """Small models copy an example: everything between the braces of the form is a description."""
    tool = {"type": "function", "function": {"name": "now"}}
    text = instructions(ToolUse(tools=[tool], is_required=True))
    (form,) = [line for line in text.splitlines() if line.startswith("<tool_call>")]
    assert (
        form
        == '<tool_call>{"name": <its name>, "arguments": <an object that matches its parameters>}</tool_call>'
    )
    assert "Several calls may follow" in text


def test_a_named_function_is_called_once() -> None:
    """The instructions say so, as its grammar does."""
    tool = {"type": "function", "function": {"name": "now"}}
    assert "Make no more than one call." in instructions(ToolUse(tools=[tool], function="now"))
