"""Stop strings, on forced texts that repeat a letter or a word, so that token boundaries are known."""

from __future__ import annotations

from typing import Any

from tests.conformance import probes
from tests.conformance.server import CHAT, LEGACY, NotShown, Server, require

_NUM_TOKENS = 5
_NEVER = "\u2603never"


def _case(server: Server, kind: str) -> tuple[str, dict[str, Any], Any, str]:
    """A path, a request, its stop strings, and the one that comes first."""
    if kind == "non_ascii":
        fields = probes.non_ascii(server)
        text = server.post(LEGACY, fields).text()
        char = next(c for c in text if not c.isascii())
        return LEGACY, fields, char, char
    if kind in ("inside", "token"):
        token_id, word = probes.word(server)
        core = word.strip()
        stop = core[1:3] if kind == "inside" else core
        return CHAT, {"max_tokens": _NUM_TOKENS} | probes.biased(token_id), stop, stop
    if kind == "earliest":
        token_id, word = probes.word(server)
        core = word.strip()
        return (
            CHAT,
            {"max_tokens": _NUM_TOKENS} | probes.biased(token_id),
            [core[2], _NEVER, core[1]],
            core[1],
        )
    letter_id, letter = next(iter(probes.letters(server).items()))
    stops: dict[str, Any] = {
        "across": letter * 3,
        "first": letter,
        "last": letter * _NUM_TOKENS,
        "fourth": [_NEVER, _NEVER + "!", "\n\n\n", letter * 2],
        "list": [letter * 2],
    }
    stop = stops[kind]
    first = stop if isinstance(stop, str) else stop[-1]
    return CHAT, {"max_tokens": _NUM_TOKENS} | probes.biased(letter_id), stop, first


def _said(server: Server, path: str, fields: dict[str, Any], *, stream: bool) -> tuple[str, Any]:
    """The text and the finish reason."""
    answer = server.post(path, fields | ({"stream": True} if stream else {}))
    if not stream:
        return answer.text(), answer.choice()["finish_reason"]
    reasons = [c["finish_reason"] for chunk in answer.chunks for c in chunk["choices"] if c["finish_reason"]]
    return "".join(answer.texts()), reasons[0] if len(reasons) == 1 else reasons


def ends_before(server: Server, kind: str, *, stream: bool) -> None:
    path, fields, stop, first = _case(server, kind)
    whole = server.once(path, **fields).text()
    if first not in whole:
        raise NotShown(f"the model did not say {first!r}, so this cannot be checked")
    wanted = whole[: whole.index(first)]
    text, reason = _said(server, path, fields | {"stop": stop}, stream=stream)
    require(text == wanted, f"the text is {text!r}, not {wanted!r}")
    require(reason == "stop", f"finish_reason is {reason!r}")


def comes_out(server: Server, kind: str, *, stream: bool) -> None:
    letter_id, letter = next(iter(probes.letters(server).items()))
    fields = {"max_tokens": _NUM_TOKENS} | probes.biased(letter_id)
    stop: Any = letter * _NUM_TOKENS + _NEVER
    if kind == "detour":  # a match begins at each token and is never completed
        stop = [letter * 2 + _NEVER, letter + "\n" + _NEVER]
    text, reason = _said(server, CHAT, fields | {"stop": stop}, stream=stream)
    require(text == letter * _NUM_TOKENS, f"the text is {text!r}, not {letter * _NUM_TOKENS!r}")
    require(reason == "length", f"finish_reason is {reason!r}")


def finish_reason(server: Server) -> None:
    letter_id, letter = next(iter(probes.letters(server).items()))
    for stream in (False, True):
        fields = {"max_tokens": 4, "stop": letter * 2} | probes.biased(letter_id)
        _, reason = _said(server, CHAT, fields, stream=stream)
        require(reason == "stop", f"finish_reason is {reason!r}")


def legacy(server: Server) -> None:
    letter_id, letter = next(iter(probes.letters(server).items()))
    for stream in (False, True):
        fields = {"max_tokens": 4, "stop": [letter * 3]} | probes.biased(letter_id)
        text, reason = _said(server, LEGACY, fields, stream=stream)
        require((text, reason) == ("", "stop"), f"{text!r} ended by {reason!r}")


def in_the_prompt(server: Server) -> None:
    letter_id, letter = next(iter(probes.letters(server).items()))
    question = [{"role": "user", "content": "Say sea."}]
    fields = {"messages": question, "max_tokens": 3, "stop": ["sea", "Say"]} | probes.biased(letter_id)
    text, reason = _said(server, CHAT, fields, stream=False)
    require((text, reason) == (letter * 3, "length"), f"{text!r} ended by {reason!r}")


def each_choice(server: Server) -> None:
    found = probes.letters(server)
    stop = next(iter(found.values()))
    fields = {"max_tokens": 6, "temperature": 2, "seed": 2, "n": 3} | probes.biased(*found)
    free, held = server.post(CHAT, fields), server.post(CHAT, fields | {"stop": stop})
    for index in range(3):
        wanted = free.text(index).partition(stop)[0]
        require(held.text(index) == wanted, f"choice {index} is {held.text(index)!r}, not {wanted!r}")
