"""The list of models in Anthropic's shape."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.anthropic.models import ModelPage, model_info, page
from common.errors import RequestError
from tests.unit.api.openai.records import MODEL

NAMED = [(name, msgspec.structs.replace(MODEL, id=name, created=created)) for name, created in
         (("a", 10), ("b", 30), ("c", 20), ("d", 20))]  # fmt: skip


def ids(found: ModelPage) -> list[str]:
    return [info.id for info in found.data]


def test_one_model() -> None:
    """With its limits; the time is RFC 3339."""
    info = msgspec.to_builtins(model_info(msgspec.structs.replace(MODEL, created=0, can_reason=True), "x/y"))
    assert info | {"capabilities": None} == {
        "type": "model",
        "id": "x/y",
        "display_name": "x/y",
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": 1000,
        "max_tokens": 1000,
        "capabilities": None,
    }
    assert info["capabilities"]["thinking"]["types"]["enabled"] == {"supported": True}
    assert info["capabilities"]["image_input"] == {"supported": False}


def test_pages() -> None:
    """The latest models first; `after_id` and `before_id` lead through the list, and say whether there are more."""
    whole = page(NAMED, {})
    assert (ids(whole), whole.has_more, whole.first_id, whole.last_id) == (
        ["b", "c", "d", "a"],
        False,
        "b",
        "a",
    )
    first = page(NAMED, {"limit": "3"})
    assert (ids(first), first.has_more) == (["b", "c", "d"], True)
    rest = page(NAMED, {"limit": "3", "after_id": first.last_id})
    assert (ids(rest), rest.has_more) == (["a"], False)
    back = page(NAMED, {"limit": "2", "before_id": "a"})
    assert (ids(back), back.has_more) == (["c", "d"], True)
    assert page(NAMED, {"limit": "2", "before_id": "c"}).has_more is False
    empty = page([], {})
    assert (empty.data, empty.has_more, empty.first_id, empty.last_id) == ([], False, None, None)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"limit": ["1", "2"]}, "limit"),
        ({"after_id": "zzz"}, "after_id"),
        ({"after_id": ["a", "b"]}, "after_id"),
        ({"before_id": "zzz"}, "before_id"),
        ({"before_id": "a", "after_id": "b"}, "before_id"),
    ],
)
def test_wrong_queries(query: dict[str, Any], param: str) -> None:
    """A 400 that names the parameter."""
    with pytest.raises(RequestError) as caught:
        page(NAMED, query)
    assert (caught.value.status, caught.value.param) == (400, param)
