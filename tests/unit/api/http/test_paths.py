"""Spellings of paths, and what a 404 says."""

from __future__ import annotations

import pytest

from api.http.paths import NotFound, normalized


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("//v1//chat/completions/", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1", "/v1"),
        ("/v1/v11/x", "/v1/v11/x"),
        ("/models/v1/v1/", "/models/v1/v1"),
        ("/", "/"),
        ("//", "/"),
        ("", "/"),
    ],
)
def test_normalized_paths(path: str, expected: str) -> None:
    """Doubled and final slashes and a doubled version mean nothing."""
    assert normalized(path) == expected


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/embeddings", "embeddings"),
        ("/v1/images/generations", "OpenAI's images"),
        ("/v1/messages/batches", "batches of requests"),
        ("/v1/batches/b1", "batches of requests"),
        ("/v1/assistants", "`/v1/responses`"),
        ("/v1/threads/t1/runs", "`/v1/responses`"),
        ("/v1/complete", "withdrawn"),
        ("/api/chat", "Ollama"),
        ("/api/tags", "Ollama"),
        ("/props", "llama.cpp"),
        ("/api/v0/models", "LM Studio"),
        ("/version", "vLLM"),
    ],
)
def test_a_404_says_what_is_served(path: str, words: str) -> None:
    """And, for an endpoint of another server, what was asked for."""
    message = NotFound(["POST /v1/chat/completions", "GET /v1/models"]).message("POST", path)
    assert message.startswith(f"Unknown request URL: POST {path}. It belongs to ")
    assert words in message
    assert message.endswith("Served are: POST /v1/chat/completions, GET /v1/models.")


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/embeddingsx", "/apichat", "/v2/images"])
def test_a_404_for_a_path_that_no_server_has(path: str) -> None:
    """It only says what is served."""
    message = NotFound(["GET /v1/models"]).message("GET", path)
    assert message == f"Unknown request URL: GET {path}. Served are: GET /v1/models."
