"""`thinking` and `output_config.effort`: what the template gets, how long the model may think, and whether the client sees it.

Thinking is off unless the request asks for it, as in Anthropic's API: clients read `content[0].text`. Used by
`api.anthropic.messages.request`. https://platform.claude.com/docs/en/build-with-claude/extended-thinking
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Effort = Literal["low", "medium", "high", "xhigh", "max"]

Display = Literal["shown", "omitted", "hidden"]
"""`omitted`: blocks without their text. `hidden`: no blocks."""


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """`adaptive` leaves it to the model how much it thinks; `between_tools` means that it does not.

    `budget_tokens` may be below Anthropic's 1,024 and above `max_tokens`.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


def is_on(thinking: Thinking | None) -> bool:
    """Whether the request asks for thinking."""
    return thinking is not None and thinking.type in ("enabled", "adaptive")


def is_enabled(thinking: Thinking | None) -> bool:
    """Whether the model must think, or may think for so many tokens; `adaptive` alone leaves it to the model."""
    return thinking is not None and (thinking.type == "enabled" or max_tokens(thinking) is not None)


def template_arguments(thinking: Thinking | None, effort: Effort | None) -> dict[str, Any]:
    """Arguments of the model's chat template."""
    arguments: dict[str, Any] = {"enable_thinking": is_on(thinking)}
    return arguments if effort is None else arguments | {"reasoning_effort": effort}


def max_tokens(thinking: Thinking | None) -> int | None:
    """After how many tokens the thoughts end; None: no limit."""
    return thinking.budget_tokens if thinking is not None and is_on(thinking) else None


def display(thinking: Thinking | None) -> Display:
    """How the answer shows thoughts. Those of a model that thinks though it should not are hidden; they count as output tokens."""
    if thinking is None or not is_on(thinking):
        return "hidden"
    return "omitted" if thinking.display == "omitted" else "shown"
