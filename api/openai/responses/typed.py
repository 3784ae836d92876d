"""Parts of a request as typed values: one object at a time, so that an error names its path, list indices included.

The body of a response request is a list of items of some forty kinds, most of which have many fields without an effect here.
Used by the other parsers of this package. Must not know what the objects mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from api.http.json_body import refusal
from api.http.unknown_keys import MAX_NAME_CHARACTERS, MAX_REPORTED_KEYS, UnknownKey
from common.errors import RequestError, invalid

S = TypeVar("S", bound=msgspec.Struct)


class Ignored:
    """The names of fields and values that have no effect, in the order in which they were found.

    Attributes:
        names: At most `MAX_REPORTED_KEYS`.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names[:MAX_REPORTED_KEYS]

    def add(self, name: str) -> None:
        if len(self.names) < MAX_REPORTED_KEYS and name not in self.names:
            self.names.append(name)


def typed(value: Any, kind: type[S], path: str, ignored: Ignored) -> S:
    """An object of the request as a struct; unknown fields are ignored and named.

    Raises:
        RequestError: 400; in `param` the path of what is wrong.
    """
    if not isinstance(value, dict):
        raise invalid(f"`{path}` must be an object.", path)
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise refusal(str(error), path) from None
    _name_unknown(value, converted, path, ignored)
    return converted


def name_unknown_keys(value: Mapping[str, Any], known: Collection[str], path: str, ignored: Ignored) -> None:
    """Name the keys of an object that are not `known`."""
    for name in value:
        if name not in known:
            ignored.add(UnknownKey(f"{path}.{name[:MAX_NAME_CHARACTERS]}"))


def _name_unknown(value: Mapping[str, Any], converted: msgspec.Struct, path: str, ignored: Ignored) -> None:
    """Name the unknown keys of an object and of the structs in its fields."""
    name_unknown_keys(value, converted.__struct_encode_fields__, path, ignored)
    for name, attribute in zip(converted.__struct_encode_fields__, converted.__struct_fields__, strict=True):
        inner = getattr(converted, attribute)
        if isinstance(inner, msgspec.Struct):
            _name_unknown(value[name], inner, f"{path}.{name}", ignored)


def missing(path: str, what: str) -> RequestError:
    """A 400: a field is required here."""
    return invalid(f"`{path}` is missing; {what}.", path, "missing_required_parameter")
