"""The models that can be used now, in Anthropic's shape: `/v1/models` and `/v1/models/{id}` with its version header.

Called by `api.model_resources`, which has the OpenAI shape too. https://platform.claude.com/docs/en/api/models-list
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from api.generation.served_model import ServedModel
from common.errors import invalid

DEFAULT_LIMIT, MAX_LIMIT = 20, 1000


class Support(msgspec.Struct, frozen=True):
    supported: bool


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="model"):
    """Anthropic's model object. A prompt and its answer share the context, so each may be as long as that allows."""

    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int
    capabilities: dict[str, Any]


class ModelPage(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the list, the model that was loaded last first."""

    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


def model_info(model: ServedModel, name: str) -> ModelInfo:
    """One model, under the name by which it was asked for."""
    created = dt.datetime.fromtimestamp(model.created, dt.UTC)
    return ModelInfo(
        id=name,
        display_name=name,
        created_at=created.isoformat().replace("+00:00", "Z"),
        lifecycle="active",
        max_input_tokens=model.context_length,
        max_tokens=model.context_length,
        capabilities=_capabilities(model),
    )


def page(models: Sequence[tuple[str, ServedModel]], query: Mapping[str, Any]) -> ModelPage:
    """The part of the list that a query asks for.

    Args:
        models: All of them, each with its name.
        query: The parameters `limit`, `after_id` and `before_id`, all optional.

    Raises:
        RequestError: 400; one of them is wrong.
    """
    listed = sorted(models, key=lambda named: (-named[1].created, named[0]))
    names = [name for name, _ in listed]
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise invalid("`after_id` and `before_id` exclude each other.", "before_id")
    if before is not None:
        end = _index(names, before, "before_id")
        start = max(0, end - limit)
        has_more = start > 0
    else:
        start = 0 if after is None else _index(names, after, "after_id") + 1
        end = start + limit
        has_more = end < len(listed)
    data = [model_info(model, name) for name, model in listed[start:end]]
    return ModelPage(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


def _limit(given: Any) -> int:
    if given is None:
        return DEFAULT_LIMIT
    limit = int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else 0
    if not 1 <= limit <= MAX_LIMIT:
        raise invalid(f"`limit` must be an integer from 1 to {MAX_LIMIT}.", "limit")
    return limit


def _index(names: list[str], name: Any, param: str) -> int:
    if name not in names:
        raise invalid(f"`{param}` is not the id of a model in the list.", param)
    return names.index(name)


def _capabilities(model: ServedModel) -> dict[str, Any]:
    yes, no = Support(supported=True), Support(supported=False)
    can_reason = yes if model.can_reason else no
    efforts = ("low", "medium", "high", "xhigh", "max")
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": {"supported": False},
        "effort": {"supported": model.can_reason, **dict.fromkeys(efforts, can_reason)},
        "image_input": no,
        "pdf_input": no,
        "server_tools": {"supported": False, "code_execution": no, "web_search": no},
        "structured_outputs": yes,
        "thinking": {
            "supported": model.can_reason,
            "types": {
                "adaptive": can_reason,
                "enabled": can_reason,
                "disabled": yes,
                "between_tools": yes,
            },
        },
    }
