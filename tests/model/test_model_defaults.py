"""What a model's folder and the operator set for all requests, with the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import StartupError
from common.protocol import ChatPrompt, GenerationJob
from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.mlx.generation import GenerationBuilder
from worker.text.detokenizer import TokenBytes

TEMPLATE = "{{ 'thinks' if enable_thinking else 'answers' }} {{ tone }}"


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    """The demo model with a generation_config.json."""
    for path in demo_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [2, 0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return tmp_path


def test_sampling_defaults_and_ends_of_text(folder: Path) -> None:
    """The file's sampling defaults are the card's; its ends of text hold whether or not the defaults are turned off."""
    loaded = mlx_model.load_model(Settings(model=str(folder)))
    assert mlx_model.describe(loaded, 1).sampling_defaults == {"temperature": 0.6, "top_k": 20}
    off = mlx_model.load_model(Settings(model=str(folder), use_generation_config=False))
    assert mlx_model.describe(off, 1).sampling_defaults == {}
    assert set(loaded.tokenizer.eos_token_ids) == set(off.tokenizer.eos_token_ids) == {0, 2}


def test_the_demo_model_has_no_defaults(demo: mlx_model.LoadedModel) -> None:
    """It behaves as the API's own defaults say."""
    assert mlx_model.describe(demo, 1).sampling_defaults == {}


def test_arguments_of_the_template(demo_folder: Path) -> None:
    """The operator's reach the template, of answers and of counts; a request's own come first."""
    arguments = '{"enable_thinking": false, "tone": "dry"}'
    settings = Settings(model=str(demo_folder), chat_template=TEMPLATE, chat_template_args=arguments)
    loaded = mlx_model.load_model(settings)
    token_bytes = TokenBytes(loaded.tokenizer)
    builder = GenerationBuilder(
        loaded.tokenizer, token_bytes, mlx_model.describe(loaded, 1), loaded.template_arguments
    )
    tokenizer = builder.make_prompt_tokenizer()

    def rendered(**own: Any) -> str:
        prompt = ChatPrompt([{"role": "user", "content": "hi"}], template_arguments=own)
        token_ids = builder.encode(GenerationJob(job_id="a", model="m", channel="c", prompt=prompt))
        counted = tokenizer.encode(prompt, tool_use=None, grammar=None, adds_special_tokens=True)
        assert counted == token_ids
        return str(loaded.tokenizer.decode(token_ids))

    assert rendered() == "answers dry"
    assert rendered(enable_thinking=True) == "thinks dry"
    assert rendered(thinking=True, tone="kind") == "thinks kind"


def test_malformed_arguments_of_the_template(demo_folder: Path) -> None:
    """A worker does not start, before it has loaded anything."""
    with pytest.raises(StartupError, match="--chat-template-args must be a JSON object"):
        mlx_model.load_model(Settings(model=str(demo_folder / "nowhere"), chat_template_args="x"))
