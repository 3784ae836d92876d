"""guidellm, a load generator, against the demo model: it asks for answers of an exact length and counts tokens in each chunk."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.harness.pool import Pool
from common.settings import Settings
from tests.clients import environments
from worker.models.demo_model import ensure_demo_model

SHIM = Path(__file__).parent
NUM_REQUESTS, NUM_STREAMS, ANSWER_TOKENS = 8, 4, 12
RUN_SECONDS = 240


@pytest.fixture(scope="module")
def report(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a short run with several streams."""
    python = environments.guidellm_environment()
    folder = tmp_path_factory.mktemp("guidellm")
    tokenizer = ensure_demo_model(Settings.load().cache_dir)
    done = subprocess.run(
        [
            *(python, "-m", "guidellm", "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={pool.url},model=demo"),
            *("--profile", f"kind=concurrent,streams={NUM_STREAMS}"),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=48,output_tokens={ANSWER_TOKENS}"),
            *("--output", f"kind=json,path={folder / 'report.json'}"),
        ],
        cwd=folder,
        env=dict(os.environ) | {"PYTHONPATH": str(SHIM), "USE_TORCH": "0", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"guidellm ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return loaded


def test_all_requests_succeed(report: dict[str, Any]) -> None:
    """No request failed or was left incomplete."""
    [benchmark] = report["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)


def test_answers_have_the_requested_length(report: dict[str, Any]) -> None:
    """`ignore_eos` and the limit of tokens make each answer exactly as long as was asked for."""
    [benchmark] = report["benchmarks"]
    lengths = {request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]}
    assert lengths == {ANSWER_TOKENS}
