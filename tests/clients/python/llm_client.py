"""The `llm` command, with a model from extra-openai-models.yaml: prompts, streams, a conversation, schemas, functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from cases import CITY_QUESTION, MAX_FORM_TOKENS, MAX_TOKENS, QUESTION, WEATHER_QUESTION, City, run

LLM = Path(sys.executable).with_name("llm")
FUNCTION = '''
def get_weather(city: str) -> str:
    """The weather in a city."""
    return "rain in " + city
'''


class Home:
    """A user folder with two models: one that is served and one that is not.

    Args:
        url: Where they are said to be.
    """

    def __init__(self, folder: str, url: str, model: str) -> None:
        self._environ = os.environ | {"LLM_USER_PATH": folder}
        names = {"served": model, "unknown": "no-such-model"}
        models = [
            {
                "model_id": model_id,
                "model_name": name,
                "api_base": url,
                "supports_schema": True,
                "supports_tools": True,
            }
            for model_id, name in names.items()
        ]
        (Path(folder) / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))

    def run(self, *arguments: str) -> Any:
        done = subprocess.run(
            [LLM, *arguments], env=self._environ, capture_output=True, text=True, timeout=120, check=False
        )
        return {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    def ask(self, question: str, *arguments: str, model: str = "served", max_tokens: int = MAX_TOKENS) -> Any:
        options = ["-o", "temperature", "0", "-o", "max_tokens", str(max_tokens)]
        return self.run("prompt", question, "-m", model, *options, *arguments)


def in_home(url: str, served: str, *asked: list[str], **options: Any) -> Any:
    """Runs prompts in the same home folder, one after another."""
    with tempfile.TemporaryDirectory(prefix="llm-") as folder:
        home = Home(folder, url, served)
        return [home.ask(*arguments, **options) for arguments in asked]


def prompt(url: str, model: str) -> Any:
    return in_home(url, model, [QUESTION, "--no-stream", "--usage"])[0]


def stream(url: str, model: str) -> Any:
    return in_home(url, model, [QUESTION, "--usage"])[0]


def conversation(url: str, model: str) -> Any:
    """The second question's usage shows whether the first and its answer came with it."""
    again = [QUESTION, "--usage", "--continue"]
    return in_home(url, model, [QUESTION, "--usage", "--system", "Answer."], again)


def schema(url: str, model: str) -> Any:
    given = json.dumps(City.model_json_schema())
    whole = [CITY_QUESTION, "--schema", given, "--no-stream"]
    streamed = [CITY_QUESTION, "--schema", given]
    return in_home(url, model, whole, streamed, max_tokens=MAX_FORM_TOKENS)


def functions(url: str, model: str) -> Any:
    """llm cannot require a call, so the model may answer with text."""
    whole = [WEATHER_QUESTION, "--functions", FUNCTION, "--usage", "--no-stream"]
    streamed = [WEATHER_QUESTION, "--functions", FUNCTION, "--usage"]
    return in_home(url, model, whole, streamed)


def unknown_model(url: str, model: str) -> Any:
    return in_home(url, model, [QUESTION], model="unknown")[0]


if __name__ == "__main__":
    run(prompt, stream, conversation, schema, functions, unknown_model)
