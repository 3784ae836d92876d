"""Which web origins may call the API."""

from __future__ import annotations

import pytest

from api.http.origins import Origins
from common.errors import StartupError

LOCAL = [
    "http://localhost",
    "https://localhost",
    "http://localhost:5173",
    "http://tauri.localhost",
    "http://127.0.0.1:3000",
    "https://127.0.0.1",
    "http://[::1]:8080",
    "http://0.0.0.0:80",
    "app://obsidian.md",
    "file://",
    "tauri://localhost",
    "vscode-webview://1a2b3c",
    "vscode-file://vscode-app",
]
FOREIGN = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://localhost.evil.example:8080",
    "http://evil.example:8080",
    "http://evillocalhost",
    "http://localhost:80@evil.example",
    "http://localhost:80, http://evil.example",
    "http://127.0.0.1.evil.example",
    "http://127.0.0.2.evil.example:80",
    "http://192.168.1.5:3000",
    "chrome-extension://abc",
    "xapp://obsidian.md",
    "null",
    "app://" + "a" * 300,
    "*",
    "",
]


def test_without_keys_local_pages_and_apps_may_call() -> None:
    """The default without API keys: any port of this machine and the schemes of desktop apps; nothing else."""
    origins = Origins(None, has_keys=False)
    assert [origin for origin in LOCAL if not origins.allows(origin)] == []
    assert [origin for origin in FOREIGN if origins.allows(origin)] == []
    assert origins.headers_without_request == {}


@pytest.mark.parametrize(
    ("setting", "has_keys"), [(None, True), ("*", False), ("https://a.example, *", False)]
)
def test_any_origin_may_call(setting: str | None, has_keys: bool) -> None:
    """With API keys by default, and without them if the setting says so."""
    origins = Origins(setting, has_keys=has_keys)
    assert all(map(origins.allows, LOCAL + FOREIGN))
    assert origins.headers_without_request["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_list_replaces_the_default(has_keys: bool) -> None:
    """Only its entries may call; `*` in one stands for any name or port, and a final slash is ignored."""
    origins = Origins(
        "https://App.example/, http://lan-*.example:*,https://*.site.example, myapp://, null",
        has_keys=has_keys,
    )
    allowed = [
        "https://app.example",
        "http://lan-1.example:99",
        "https://a.b.site.example",
        "myapp://",
        "null",
    ]
    assert [origin for origin in allowed if not origins.allows(origin)] == []
    refused = [
        "https://app.example:444",
        "http://app.example",
        "http://lan-1.example",
        "https://site.example",
    ]
    refused += [
        "https://x/.site.example",
        "http://localhost",
        "myapp://x",
        "https://app.example.evil.example",
    ]
    assert [origin for origin in refused if origins.allows(origin)] == []
    assert origins.headers_without_request == {}


@pytest.mark.parametrize(
    "entry", ["app.example", "localhost:3000", "https://a.example/path", "https://a b", "**", "://x"]
)
def test_a_malformed_entry_stops_the_start(entry: str) -> None:
    """The sentence names the setting and the entry."""
    with pytest.raises(StartupError, match="MLXPOOL_CORS_ORIGINS must be") as raised:
        Origins(f"https://b.example,{entry}", has_keys=False)
    assert repr(entry) in str(raised.value)


def test_hosts_of_listed_origins() -> None:
    """A proxy's name is taken from the origins of its pages, never from those of apps."""
    origins = Origins(
        "https://pool.example:8443, http://*.lan.example:*, http://[fd00::1]:80, app://*", has_keys=False
    )
    assert all(map(origins.lists_host, ["pool.example", "POOL.example", "a.lan.example", "[fd00::1]"]))
    assert not any(map(origins.lists_host, ["evil.example", "pool.example.evil.example", "lan.example", ""]))
    assert not Origins(None, has_keys=False).lists_host("localhost")


def test_local_stands_for_the_default() -> None:
    """What is listed beside `local` adds to the pages of this machine and desktop apps, instead of replacing them."""
    origins = Origins("local, https://app.example", has_keys=False)
    assert [origin for origin in [*LOCAL, "https://app.example"] if not origins.allows(origin)] == []
    assert [origin for origin in FOREIGN if origins.allows(origin)] == []
    assert not Origins("https://app.example", has_keys=False).allows(LOCAL[0])
