"""Sampling: what a seed, a bias, a limit or a penalty guarantees on any model."""

from __future__ import annotations

from typing import Any

from tests.conformance import probes
from tests.conformance.server import CHAT, Server, require

_NUM_AT_ONCE = 6


def _draw(server: Server, **fields: Any) -> dict[str, Any]:
    """A request that samples eight tokens from eight letters."""
    return {"max_tokens": 8, "temperature": 2} | fields | probes.biased(*probes.letters(server))


def repeats(server: Server, fields: dict[str, Any], path: str = CHAT) -> None:
    texts = [server.post(path, fields).text() for _ in range(2)]
    require(len(set(texts)) == 1, f"it gave {texts}")


def at_once_as_alone(server: Server, fields: dict[str, Any]) -> None:
    questions = [f"Count from {i} to {i + 5}." + " Now." * (i * 7) for i in range(_NUM_AT_ONCE)]
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"max_tokens": 6, "messages": [{"role": "user", "content": question}]} | fields)
        for question in questions
    ]
    alone = [server.post(*each).text() for each in asked]
    together = [answer.text() for answer in server.concurrently(asked)]
    wrong = [i for i in range(_NUM_AT_ONCE) if alone[i] != together[i]]
    require(
        not wrong, f"{len(wrong)} of {_NUM_AT_ONCE} differ, such as {together[wrong[0]]!r}" if wrong else ""
    )


def mixed_as_alone(server: Server) -> None:
    letter_id = next(iter(probes.letters(server)))
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1, "seed": 3},
        probes.biased(letter_id),
        {"frequency_penalty": 2, "presence_penalty": 1},
        {"temperature": 1, "seed": 8, "top_p": 0.5},
        {"logprobs": True, "top_logprobs": 2},
    ]
    asked: list[tuple[str, dict[str, Any]]] = [(CHAT, {"max_tokens": 6} | kind) for kind in kinds]
    alone = [server.post(*each).text() for each in asked]
    together = [answer.text() for answer in server.concurrently(asked)]
    wrong = [str(kinds[i]) for i in range(len(kinds)) if alone[i] != together[i]]
    require(not wrong, f"the text differs next to other requests: {', '.join(wrong)}")


def seeds_differ(server: Server) -> None:
    texts = {
        answer.text() for answer in server.concurrent_chats([_draw(server, seed=seed) for seed in range(4)])
    }
    require(len(texts) > 1, f"four seeds gave {texts}")


def unseeded_differ(server: Server) -> None:
    texts = {answer.text() for answer in server.concurrent_chats([_draw(server)] * 4)}
    require(len(texts) > 1, f"four draws gave {texts}")


def choices_differ(server: Server) -> None:
    answer = server.chat(**_draw(server, n=4))
    texts = {answer.text(index) for index in range(4)}
    require(len(texts) > 1, f"four choices are {texts}")


def choices_repeat(server: Server) -> None:
    one, other = (server.chat(**_draw(server, n=3, seed=21)) for _ in range(2))
    for index in range(3):
        require(one.text(index) == other.text(index), f"choice {index} differs")


def eight(server: Server) -> None:
    answer = server.chat(n=8)
    indices = sorted(choice["index"] for choice in answer.json["choices"])
    require(indices == [*range(8)], f"the indices are {indices}")


def bias_forces(server: Server, path: str = CHAT) -> None:
    for letter_id, letter in [*probes.letters(server).items()][:3]:
        text = server.post(path, {"max_tokens": 4} | probes.biased(letter_id)).text()
        require(text == letter * 4, f"{letter!r} was forced, and the text is {text!r}")


def bias_bans(server: Server) -> None:
    """Of two forced tokens, the one that would be sampled is banned."""
    found = dict([*probes.letters(server).items()][:2])
    taken = server.chat(**probes.biased(*found)).text()
    require(taken in found.values(), f"{taken!r} is not one of the forced tokens")
    banned = next(token_id for token_id, letter in found.items() if letter == taken)
    bias = probes.biased(*found)["logit_bias"] | {str(banned): -100}
    other = server.chat(logit_bias=bias).text()
    require(other == next(letter for letter in found.values() if letter != taken), f"the text is {other!r}")


def is_greedy(server: Server, fields: dict[str, Any]) -> None:
    greedy = server.once(CHAT, max_tokens=6).text()
    for answer in server.concurrent_chats([{"max_tokens": 6, "seed": seed} | fields for seed in (1, 2)]):
        text = answer.text()
        require(text == greedy, f"{text!r} is not {greedy!r}")


def xtc(server: Server) -> None:
    """Of letters above the threshold only the least likely remains, which is not the greedy one."""
    found = [*probes.letters(server)][:2]
    asked = {"temperature": 2, "seed": 1} | probes.biased(*found)
    limits = {"xtc_probability": 1, "xtc_threshold": 0.000001}
    drawn = {
        answer.text()
        for answer in server.concurrent_chats([asked | limits | {"seed": seed} for seed in range(4)])
    }
    free = server.chat(**asked | {"temperature": 0}).text()
    require(drawn and free not in drawn, f"{free!r} was drawn nevertheless")


def hot(server: Server) -> None:
    cold = server.chat(**_draw(server, temperature=0)).text()
    drawn = server.concurrent_chats([_draw(server, seed=seed) for seed in range(3)])
    texts = "".join(answer.text() for answer in drawn)
    require(len(set(texts)) > len(set(cold)) or len(set(texts)) > 3, f"it drew {texts!r}")


def penalty(server: Server, param: str, high: float, low: float) -> None:
    """A greedy text has more distinct letters with a high value of the parameter than with a low one."""
    asked = [_draw(server, temperature=0) | {param: value} for value in (high, low)]
    much, little = (answer.text() for answer in server.concurrent_chats(asked))
    require(len(set(much)) > len(set(little)), f"{param} {high} gave {much!r}, {low} gave {little!r}")
