"""The keys of a request body that its type does not have, at every depth, as paths such as ``messages[3].cache_control``.

`api.http.json_body` reports them for all protocols. The type is a msgspec struct, whose fields may be structs, tagged unions of
structs, and lists or dicts of them. Whatever else a field holds, such as a JSON Schema or metadata, is the client's own data and
has no unknown keys. Values that are not inspected are skipped by msgspec, not decoded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import inspect

MAX_REPORTED_KEYS = 32
"""A body may have hundreds of thousands."""

MAX_NAME_CHARACTERS = 64
"""Of a key or its path, which may be as long as a body."""


class UnknownKey(str):
    """The path of an unknown key; other names among a request's ignored ones are of known parameters without effect."""

    __slots__ = ()


_OBJECT, _ARRAY = ord("{"), ord("[")

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_name = msgspec.json.Decoder(str).decode


@dataclass(eq=False)
class _Shape:
    """What a value may contain that has to be inspected.

    Attributes:
        names: The keys of an object that is a struct; None: its keys are not inspected.
        inner: Of those, the ones whose values are inspected.
        tag_field: Of a union of structs: the field that says which one an object is.
        by_tag: The structs of such a union.
        values: Of all values of an object that is a dict.
        items: Of all items of an array.
    """

    names: set[str] | None = None
    inner: dict[str, _Shape] = field(default_factory=dict)
    tag_field: str | None = None
    by_tag: dict[str, _Shape] = field(default_factory=dict)
    values: _Shape | None = None
    items: _Shape | None = None


class UnknownKeys:
    """Finds the keys that `body_type` does not have."""

    def __init__(self, body_type: type[msgspec.Struct]) -> None:
        shape = _shape(inspect.type_info(body_type), {})
        assert shape is not None
        self._shape = shape
        self._has_none = _quick_check(body_type)

    def find(self, body: bytes) -> list[UnknownKey]:
        """Their paths, at most `MAX_REPORTED_KEYS`. A key that several items of a list have is reported once, where it comes first.

        Args:
            body: JSON that the type has accepted.
        """
        if self._has_none(body):
            return []
        search = _Search()
        search.inspect(msgspec.Raw(body.strip()), self._shape, "")
        return list(search.found.values())


class _Search:
    """One search; it stops when it has found enough.

    Attributes:
        found: Paths by the shape that lacks the key, and the key.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], UnknownKey] = {}

    def inspect(self, raw: msgspec.Raw, shape: _Shape, path: str) -> None:
        first = memoryview(raw)[0]
        if first == _OBJECT:
            self._inspect_object(raw, shape, path)
        elif first == _ARRAY and (items := shape.items) is not None:
            for i, item in enumerate(_decode_array(raw)):
                self.inspect(item, items, f"{path}[{i}]")

    def _inspect_object(self, raw: msgspec.Raw, shape: _Shape, path: str) -> None:
        values = _decode_object(raw)
        if shape.tag_field is not None:
            tag = values.get(shape.tag_field)
            variant = shape.by_tag.get(_decode_name(tag)) if tag is not None else None
            if variant is None:
                return
            shape = variant
        before = path and path + "."
        if shape.names is not None and not values.keys() <= shape.names:
            self._record((name for name in values if name not in shape.names), shape, before)
        inspected = shape.inner if shape.values is None else dict.fromkeys(values, shape.values)
        for name, inner in inspected.items():
            if name in values and len(self.found) < MAX_REPORTED_KEYS:
                self.inspect(values[name], inner, before + name[:MAX_NAME_CHARACTERS])

    def _record(self, names: Iterable[str], shape: _Shape, before: str) -> None:
        for name in names:
            if len(self.found) == MAX_REPORTED_KEYS:
                return
            key = name[:MAX_NAME_CHARACTERS]
            self.found.setdefault((id(shape), key), UnknownKey((before + key)[:MAX_NAME_CHARACTERS]))


def _shape(kind: inspect.Type, known: dict[type, _Shape]) -> _Shape | None:
    """The shape of values of a type; None: nothing in them is inspected.

    Args:
        known: Shapes of structs so far, since a struct may contain itself.
    """
    if isinstance(kind, inspect.Metadata):
        return _shape(kind.type, known)
    if isinstance(kind, inspect.StructType):
        return _of_struct(kind, known)
    if isinstance(kind, inspect.UnionType):
        return _of_union(kind, known)
    if isinstance(kind, inspect.CollectionType):
        items = _shape(kind.item_type, known)
        return None if items is None else _Shape(items=items)
    if isinstance(kind, inspect.DictType):
        values = _shape(kind.value_type, known)
        return None if values is None else _Shape(values=values)
    return None


def _of_struct(kind: inspect.StructType, known: dict[type, _Shape]) -> _Shape:
    if kind.cls in known:
        return known[kind.cls]
    shape = known[kind.cls] = _Shape(names={each.encode_name for each in kind.fields})
    assert shape.names is not None
    if kind.tag_field is not None:
        shape.names.add(kind.tag_field)
    for each in kind.fields:
        inner = _shape(each.type, known)
        if inner is not None:
            shape.inner[each.encode_name] = inner
    return shape


def _of_union(kind: inspect.UnionType, known: dict[type, _Shape]) -> _Shape | None:
    """At most one of its types is an array, and its objects are told apart by a tag, as msgspec requires."""
    union = _Shape()
    has_any = False
    for each in kind.types:
        shape = _shape(each, known)
        if shape is None:
            continue
        has_any = True
        bare = each.type if isinstance(each, inspect.Metadata) else each
        if isinstance(bare, inspect.StructType) and bare.tag_field is not None:
            union.tag_field = bare.tag_field
            union.by_tag[str(bare.tag)] = shape
        else:
            if shape.names is not None:
                union.names, union.inner = shape.names, shape.inner
            union.values = shape.values or union.values
            union.items = shape.items or union.items
    return union if has_any else None


class _UndecidedError(Exception):
    """No type can make the quick check: a struct contains itself, or a union has a type that is not in `_PLAIN`."""


def _quick_check(body_type: type[msgspec.Struct]) -> Callable[[bytes], bool]:
    """Whether a body has no unknown key, in one pass in C; most bodies have none. False also if that cannot be decided so."""
    try:
        decode = msgspec.json.Decoder(_strict(inspect.type_info(body_type), [])).decode
    except _UndecidedError:
        return lambda _body: False

    def has_none(body: bytes) -> bool:
        try:
            decode(body)
        except msgspec.ValidationError:
            return False
        return True

    return has_none


def _strict(kind: inspect.Type, outer: list[type]) -> Any:
    """A type that refuses unknown keys and skips all values that are not inspected.

    Args:
        outer: The structs around this type.
    """
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.StructType):
        return _strict_struct(kind, outer)
    if isinstance(kind, inspect.UnionType):
        return _strict_union(kind, outer)
    if isinstance(kind, inspect.CollectionType):
        inner: Any = _strict(kind.item_type, outer)
        return msgspec.Raw if inner is msgspec.Raw else list[inner]
    if isinstance(kind, inspect.DictType):
        inner = _strict(kind.value_type, outer)
        return msgspec.Raw if inner is msgspec.Raw else dict[str, inner]
    return msgspec.Raw


def _strict_union(kind: inspect.UnionType, outer: list[type]) -> Any:
    types = [_strict(each, outer) for each in kind.types]
    if all(each is msgspec.Raw for each in types):
        return msgspec.Raw
    return functools.reduce(
        operator.or_,
        [
            _plain(each) if strict is msgspec.Raw else strict
            for each, strict in zip(kind.types, types, strict=True)
        ],
    )


def _plain(kind: inspect.Type) -> Any:
    bare = kind.type if isinstance(kind, inspect.Metadata) else kind
    if type(bare) not in _PLAIN:
        raise _UndecidedError
    return _PLAIN[type(bare)]


def _strict_struct(kind: inspect.StructType, outer: list[type]) -> type[msgspec.Struct]:
    if kind.cls in outer:
        raise _UndecidedError
    fields = [
        (
            each.name,
            _strict(each.type, [*outer, kind.cls]),
            msgspec.field(name=each.encode_name, default=None),
        )
        for each in kind.fields
    ]
    return msgspec.defstruct(
        kind.cls.__name__, fields, tag=kind.tag, tag_field=kind.tag_field, forbid_unknown_fields=True
    )


_PLAIN: dict[type[inspect.Type], Any] = {
    inspect.StrType: str,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.BoolType: bool,
    inspect.NoneType: None,
    inspect.LiteralType: str,
    inspect.DictType: dict[str, msgspec.Raw],
    inspect.ListType: list[msgspec.Raw],
}
"""What stands for a type in a union with others; msgspec allows no `Raw` there."""
