"""Shared by the Python scripts of this folder: the prompts, and how results are reported.

A script runs in the clients' environment as `python SCRIPT BASE_URL MODEL [CASE...]` and prints one JSON object on its
last line: for each case its value, or the traceback of what went wrong. It knows nothing of mlx-pool.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Case = Callable[[str, str], Any]
"""Takes the base URL and the model; its return value is printed."""

KEY = "none"
QUESTION = "What is the capital of France?"
WEATHER_QUESTION = "What is the weather in Paris?"
CITY_QUESTION = "Describe the city of Paris as JSON."
TOO_LONG = "word " * 9000
MAX_TOKENS = 16
MAX_FORM_TOKENS = 160
"""Enough for any value of the types below."""


class Closed(BaseModel):
    """Forbids other properties, so that no answer goes on forever, whatever the model generates."""

    model_config = ConfigDict(extra="forbid")


class City(Closed):
    """Facts about a city."""

    name: str = Field(max_length=12, description="The city's name")
    continent: Literal["Africa", "Asia", "Europe"]
    is_capital: bool
    districts: list[Annotated[int, Field(ge=0, le=20)]] = Field(max_length=2)


class get_weather(Closed):  # noqa: N801 - the clients take the function's name from it
    """The weather in a city."""

    city: str = Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


class get_time(Closed):  # noqa: N801
    """The time in a zone."""

    zone: Annotated[int, Field(ge=-12, le=12)]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def run(*cases: Case) -> None:
    """Run all cases, or those named on the command line, and print their results."""
    base_url, model, *chosen = sys.argv[1:]
    outcomes: dict[str, Any] = {}
    for case in cases:
        if chosen and case.__name__ not in chosen:
            continue
        try:
            outcomes[case.__name__] = {"value": case(base_url, model)}
        except Exception:  # noqa: BLE001 - the next case is tried in any event, and the test shows the traceback
            outcomes[case.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(outcomes) + "\n")


def refused(call: Callable[[], Any]) -> dict[str, Any]:
    """What a client raised for an error: the exception's types, message, and other fields.

    Raises:
        AssertionError: There was none.
    """
    try:
        answer = call()
    except Exception as error:  # noqa: BLE001 - which type it is, is what the test looks at
        return {
            "types": [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__],
            "message": str(error),
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "param": getattr(error, "param", None),
        }
    raise AssertionError(f"no error, but {answer!r}")
