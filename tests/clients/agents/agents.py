"""The coding agents: how each is started against a server, without telemetry and updates, and where its final report is.

Used by `tests.clients.agents.session`. docs/clients.md shows the same configurations to users. Independent of the task.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "none"


@dataclass(frozen=True, slots=True)
class Start:
    """How an agent is started for one task.

    Attributes:
        command: Its first word is a program of `node_modules/.bin`.
        environ: Next to HOME, PATH and the XDG variables.
        files: By path in the home folder.
    """

    command: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent.

    Attributes:
        start: From the server's address, the model and the task.
        model: What it asks for; the pool has an alias for every name.
        report: The final report, from the agent's standard output.
    """

    name: str
    start: Callable[[str, str, str], Start]
    report: Callable[[str], str]
    model: str = "scripted"


def _opencode(url: str, model: str, task: str) -> Start:
    config = {
        "model": f"pool/{model}",
        "share": "disabled",
        "autoupdate": False,
        "permission": "allow",
        "provider": {
            "pool": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
                "models": {model: {"limit": {"context": 100_000, "output": 8_000}}},
            }
        },
    }
    return Start(
        ["opencode", "run", "--format", "json", task],
        {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"},
        {".config/opencode/opencode.json": json.dumps(config)},
    )


def _opencode_report(stdout: str) -> str:
    texts = [event["part"]["text"] for event in _json_lines(stdout) if event["type"] == "text"]
    return str(texts[-1])


def _qwen(url: str, model: str, task: str) -> Start:
    settings = {
        "general": {"enableAutoUpdate": False},
        "telemetry": {"enabled": False},
        "privacy": {"usageStatisticsEnabled": False},
        "security": {"auth": {"selectedType": "openai"}},
    }
    return Start(
        ["qwen", "--yolo", "--model", model, "--output-format", "json", "--prompt", task],
        {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY},
        {".qwen/settings.json": json.dumps(settings)},
    )


def _last_result(stdout: str) -> str:
    """Qwen Code's and Claude Code's: one JSON value, or a list of events of which the last is the result."""
    value = json.loads(stdout.splitlines()[-1])
    return str((value[-1] if isinstance(value, list) else value)["result"])


def _codex(url: str, model: str, task: str) -> Start:
    config = f"""
model = "{model}"
model_provider = "pool"
check_for_update_on_startup = false
analytics = {{ enabled = false }}

[model_providers.pool]
name = "pool"
base_url = "{url}/v1"
env_key = "POOL_API_KEY"
wire_api = "responses"
"""
    no_sandbox = "--dangerously-bypass-approvals-and-sandbox"
    return Start(
        ["codex", "exec", "--json", no_sandbox, task], {"POOL_API_KEY": KEY}, {".codex/config.toml": config}
    )


def _codex_report(stdout: str) -> str:
    items = [event["item"] for event in _json_lines(stdout) if event["type"] == "item.completed"]
    return str([item["text"] for item in items if item["type"] == "agent_message"][-1])


def _claude(url: str, model: str, task: str) -> Start:
    models = {"ANTHROPIC_MODEL": model, "ANTHROPIC_DEFAULT_HAIKU_MODEL": model} if model else {}
    return Start(
        ["claude", "--print", "--output-format", "json", "--allowedTools", "Bash,Read,Edit", "--", task],
        {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": KEY,
            **models,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
        },
    )


def _json_lines(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


AGENTS = {
    agent.name: agent
    for agent in (
        Agent("opencode", _opencode, _opencode_report),
        Agent("qwen", _qwen, _last_result),
        Agent("codex", _codex, _codex_report),
        # For a model of OpenAI's it offers more tools: one for patches, whose input is free text.
        Agent("codex-gpt", _codex, _codex_report, "gpt-5.5"),
        Agent("claude", _claude, _last_result),
        # It chooses the names of its models, and also asks a small one.
        Agent("claude-default", _claude, _last_result, ""),
    )
}


def write_files(start: Start, home: Path) -> None:
    """Write the agent's configuration into its home folder."""
    for name, text in start.files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
