"""Which host names the API answers to without API keys."""

from __future__ import annotations

import socket

import pytest

from api.http.hosts import Hosts
from api.http.origins import Origins

ALWAYS = [
    None,
    "",
    "localhost",
    "LOCALHOST:8080",
    "localhost.",
    "pool.localhost:80",
    "127.0.0.1:8080",
    "127.1.2.3",
    "[::1]",
    "[::1]:8080",
    "10.0.0.5:1234",
    "[fd00::1]:8080",
    "anns-mac",
    "Anns-Mac.local:8080",
    "anns-mac.home.example",
    "host.docker.internal:8080",
    "host.containers.internal",
]
LOCAL_NETWORK = ["x", "pool:8080", "other.local", "gpu.internal:8080", "nas.home.arpa", "nas.lan", "mac.home"]
FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "evillocalhost.example",
    "127.0.0.1.evil.example",
    "local.evil.example:80",
    "a@localhost",
    "localhost:80:80",
    "localhost/",
    "localhost evil.example",
    "localhost, evil.example",
    "http://localhost",
    "[::1",
    "[evil.example]",
    "::1",
    ":8080",
    ".",
    "a" * 300 + ".localhost",
]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Anns-Mac.home.example")


def refused(hosts: Hosts, names: list[str | None] | list[str]) -> list[str | None]:
    return [name for name in names if not hosts.allows(name)]


@pytest.mark.parametrize("listen_host", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback(listen_host: str) -> None:
    """Only names of this machine and IP addresses, which no DNS server can rebind."""
    hosts = Hosts(listen_host, Origins(None, has_keys=False))
    assert refused(hosts, ALWAYS) == []
    assert refused(hosts, LOCAL_NETWORK) == LOCAL_NETWORK
    assert refused(hosts, FOREIGN) == FOREIGN


@pytest.mark.parametrize("listen_host", ["0.0.0.0", "::", "192.168.1.5"])  # noqa: S104 (not bound)
def test_beyond_loopback(listen_host: str) -> None:
    """Also names that only the local network has."""
    hosts = Hosts(listen_host, Origins(None, has_keys=False))
    assert refused(hosts, ALWAYS + LOCAL_NETWORK) == []
    assert refused(hosts, FOREIGN) == FOREIGN


def test_configured_names() -> None:
    """The host that the API listens on and those of listed origins; a list does not take localhost away."""
    hosts = Hosts("Pool.example", Origins("https://proxy.example", has_keys=False))
    assert refused(hosts, ["pool.example:8080", "proxy.example", "localhost", "evil.example"]) == [
        "evil.example"
    ]


def test_any_origin_means_any_host() -> None:
    """If every page may call, rebinding gains nothing."""
    assert refused(Hosts("127.0.0.1", Origins("*", has_keys=False)), ["evil.example"]) == []


def test_the_machines_name_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop gets another one on another network; an empty one matches nothing."""
    hosts = Hosts("127.0.0.1", Origins(None, has_keys=False))
    monkeypatch.setattr(socket, "gethostname", lambda: "guest-7")
    assert refused(hosts, ["guest-7.local", "anns-mac"]) == ["anns-mac"]
    monkeypatch.setattr(socket, "gethostname", str)
    assert refused(hosts, [".local", "."]) == [".local", "."]


def test_a_pattern_for_every_name_lists_no_host() -> None:
    """An origin of any name on one port is a rule for pages; it does not switch the defence against rebinding off."""
    hosts = Hosts("127.0.0.1", Origins("local, http://*:3000, https://*.app.example", has_keys=False))
    assert not hosts.allows("evil.example")
    assert hosts.allows("chat.app.example")
