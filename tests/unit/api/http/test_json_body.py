"""Bodies as typed values, and their unknown keys at every depth."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from api.http import unknown_keys
from api.http.json_body import BodyDecoder
from api.http.unknown_keys import UnknownKeys
from common.errors import RequestError


class Leaf(msgspec.Struct):
    value: int | None = None
    schema: dict[str, Any] | None = None


class TextItem(msgspec.Struct, tag="text", tag_field="type"):
    text: str = ""


class GroupItem(msgspec.Struct, tag="group", tag_field="type"):
    items: list[TextItem | GroupItem] = []


class Root(msgspec.Struct):
    leaf: Leaf | str | None = None
    leaves: list[Leaf] | str | None = None
    by_name: dict[str, Leaf] | None = None
    texts: list[TextItem | str] | None = None
    named: int | None = msgspec.field(default=None, name="renamed")
    count: int | None = None
    share: float | None = None
    free: Any = None


class RecursiveRoot(Root):
    items: list[str | TextItem | GroupItem] | None = None


DECODER = BodyDecoder(Root)
RECURSIVE = BodyDecoder(RecursiveRoot)


def unknown(body: dict[str, Any]) -> list[str]:
    """By the type for which one pass suffices, if there is nothing to report, and by the one that is always walked."""
    data = json.dumps(body).encode()
    paths = RECURSIVE.decode(data)[1]
    if "items" not in body:
        assert DECODER.decode(data)[1] == paths
    return paths


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({}, []),
        ({"renamed": 1, "free": {"x": 1}, "count": 1}, []),
        ({"x": 1, "named": 2}, ["x", "named"]),
        ({"leaf": {"value": 1, "x": {"y": 1}}}, ["leaf.x"]),
        ({"leaf": "text"}, []),
        ({"leaf": None, "leaves": None, "by_name": None}, []),
        ({"leaves": [{}, {"value": 1}, {"x": 1}]}, ["leaves[2].x"]),
        ({"leaves": [{"schema": {"x": {"y": [{"z": 1}]}}}]}, []),
        ({"leaves": "text"}, []),
        ({"by_name": {"a": {}, "b": {"x": 1}}}, ["by_name.b.x"]),
        ({"texts": ["text", {"type": "text", "text": "t"}]}, []),
        ({"texts": ["text", {"type": "text", "x": "t"}]}, ["texts[1].x"]),
        ({"items": ["text", {"type": "text", "text": "t", "items": []}]}, ["items[1].items"]),
        (
            {"items": [{"type": "group", "items": [{"type": "group", "items": [{"type": "text", "x": 1}]}]}]},
            ["items[0].items[0].items[0].x"],
        ),
        ({"free": [{"x": 1}]}, []),
    ],
)
def test_unknown_keys_are_named_with_their_paths(body: dict[str, Any], paths: list[str]) -> None:
    """At every depth, in lists, dicts and tagged unions; keys of the client's own data are not unknown."""
    assert unknown(body) == paths


def test_a_key_of_many_items_is_reported_once() -> None:
    """Otherwise one habit of a client, such as an id for each message, would hide the other keys."""
    leaves = [{"x": 1}, {"x": 1, "y": 1}, {"x": 1}]
    assert unknown({"leaves": leaves, "zzz": 1}) == ["zzz", "leaves[0].x", "leaves[1].y"]


def test_the_report_is_bounded() -> None:
    """A body can have any number of unknown keys, and each can be as long as the body."""
    paths = unknown({"k" * 1000: 1} | {f"key{i}": 1 for i in range(100)})
    assert len(paths) == unknown_keys.MAX_REPORTED_KEYS
    assert paths[0] == "k" * unknown_keys.MAX_NAME_CHARACTERS


def test_values_that_are_not_inspected_are_not_decoded() -> None:
    """A number with more digits than Python converts, in a field that is ignored, is no error."""
    body = b'{"zzz": [' + b"1" * 5000 + b'], "leaves": [{"x": ' + b"1" * 5000 + b"}]}"
    assert UnknownKeys(Root).find(body) == ["zzz", "leaves[0].x"]


def test_white_space_around_values_does_not_hide_keys() -> None:
    """JSON allows it around every value."""
    assert UnknownKeys(Root).find(b' \n{ "leaves" :\t[ \n{ "x" : 1 } ] }\n ') == ["leaves[0].x"]


class Inner(msgspec.Struct):
    count: int


class Nested(msgspec.Struct):
    """A body with integers below its fields."""

    inner: Inner
    counts: list[int] = []
    free: Any = None


@pytest.mark.parametrize("number", ["5.0", "5.00", "-5.0"])
def test_an_integral_float_is_an_integer(number: str) -> None:
    """JSON has one type of numbers; JavaScript and Lua clients write 5.0 for 5."""
    value, ignored = DECODER.decode(f'{{"count": {number}, "share": 1.0, "zzz": 1}}'.encode())
    assert (value.count, value.share, ignored) == (int(float(number)), 1.0, ["zzz"])


@pytest.mark.parametrize("number", ["5.5", "true", '"5.0"', "5e400", "1.0e30"])
def test_another_value_is_not_an_integer(number: str) -> None:
    """The error names the field."""
    with pytest.raises(RequestError) as raised:
        DECODER.decode(f'{{"count": {number}}}'.encode())
    assert raised.value.param in ("count", None)
    assert raised.value.status == 400


def test_integral_floats_below_the_top_level() -> None:
    """In objects and lists too; other numbers stay what they are."""
    decoder = BodyDecoder(Nested)
    value, ignored = decoder.decode(
        b'{"inner": {"count": 5.0}, "counts": [1, 2.0], "free": [0.5, 1e300], "z": 1}'
    )
    assert (value.inner.count, value.counts, value.free, ignored) == (5, [1, 2], [0.5, 1e300], ["z"])
    with pytest.raises(RequestError) as raised:
        decoder.decode(b'{"inner": {"count": 5.5}}')
    assert raised.value.param == "inner.count"
    with pytest.raises(RequestError) as raised:
        decoder.decode(b'{"inner": {"count": 5.0}, "z": ' + b"1" * 5000 + b"}")
    assert raised.value.param == "inner.count"
