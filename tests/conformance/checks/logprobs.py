"""Log-probabilities of chats and completions."""

from __future__ import annotations

import codecs
from typing import Any

from tests.conformance import probes
from tests.conformance.server import CHAT, Answer, Server, require

_CLOSE = 1e-3


def _items(answer: Answer, index: int = 0) -> list[dict[str, Any]]:
    found = answer.choice(index).get("logprobs")
    require(
        isinstance(found, dict) and isinstance(found.get("content"), list), f"logprobs is {str(found)[:60]}"
    )
    items: list[dict[str, Any]] = found["content"]
    require(items, "there are no items")
    return items


def _asked(server: Server, **fields: Any) -> Answer:
    return server.once(CHAT, **{"max_tokens": 4, "logprobs": True, "top_logprobs": 3} | fields)


def items(server: Server) -> None:
    answer = _asked(server)
    found, counted = _items(answer), answer.json["usage"]["completion_tokens"]
    require(len(found) == counted, f"{counted} tokens have {len(found)} items")
    kinds: dict[str, Any] = {"token": str, "logprob": float | int, "bytes": list, "top_logprobs": list}
    for item in found:
        for name, kind in kinds.items():
            require(isinstance(item.get(name), kind), f"an item's {name} is {item.get(name)!r}")
        for each in item["top_logprobs"]:
            require({"token", "logprob", "bytes"} <= set(each), f"top_logprobs has {sorted(each)}")


def not_positive(server: Server) -> None:
    for item in _items(_asked(server)):
        values = [item["logprob"], *(each["logprob"] for each in item["top_logprobs"])]
        require(max(values) <= 0, f"there is a logprob of {max(values)}")


def so_many(server: Server, number: int, fields: dict[str, Any]) -> None:
    for item in _items(server.chat(max_tokens=3, logprobs=True, **fields)):
        counted = len(item["top_logprobs"])
        require(counted == number, f"there are {counted}")


def are_sorted(server: Server) -> None:
    for item in _items(_asked(server, top_logprobs=10)):
        values = [each["logprob"] for each in item["top_logprobs"]]
        require(len(values) == 10 and values == sorted(values, reverse=True), f"they are {values}")


def greedy_is_first(server: Server) -> None:
    for item in _items(_asked(server)):
        first = item["top_logprobs"][0]
        require(item["token"] == first["token"], f"{item['token']!r} was sampled, not {first['token']!r}")
        require(
            abs(item["logprob"] - first["logprob"]) < _CLOSE, "its logprob differs from that in top_logprobs"
        )


def add_up(server: Server) -> None:
    answer = _asked(server, max_tokens=6)
    text = "".join(item["token"] for item in _items(answer))
    require(text == answer.text(), f"{text!r} is not {answer.text()!r}")


def bytes_add_up(server: Server) -> None:
    """A chat that is likely to answer with the emoji of its question; its text is checked in any case."""
    question = [{"role": "user", "content": "Repeat: 😀 😀 😀 😀"}]
    for fields in ({"max_tokens": 6}, {"max_tokens": 8, "messages": question}, _spoken(server)):
        answer = _asked(server, **fields)
        data = b"".join(bytes(item["bytes"]) for item in _items(answer))
        # Of a character that max_tokens cuts, the tokens have bytes, and the text has nothing.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        require(text == answer.text(), f"{data!r} is not {answer.text()!r}")


def _spoken(server: Server) -> dict[str, Any]:
    """Random single bytes of a byte-level vocabulary are rarely complete characters."""
    return {"max_tokens": 4, "temperature": 2, "seed": 1} | probes.biased(*probes.letters(server))


def describe_the_sampled(server: Server) -> None:
    """Forced letters are one token each, so the text shows which were sampled."""
    found = probes.letters(server)
    fields = {"max_tokens": 8, "temperature": 2, "seed": 6} | probes.biased(*found)
    answer = _asked(server, **fields)
    tokens = [item["token"] for item in _items(answer)]
    require("".join(tokens) == answer.text() and len(tokens) == 8, f"{tokens} are not {answer.text()!r}")


def in_a_stream(server: Server) -> None:
    plain = _items(_asked(server))
    chunks = _asked(server, stream=True).chunks
    found = [
        item
        for chunk in chunks
        for choice in chunk["choices"]
        for item in (choice.get("logprobs") or {}).get("content") or []
    ]
    require(
        [item["token"] for item in found] == [item["token"] for item in plain],
        f"{len(found)} items were streamed",
    )
    for one, other in zip(found, plain, strict=True):
        require(abs(one["logprob"] - other["logprob"]) < _CLOSE, "logprobs differ")
        require(len(one["top_logprobs"]) == len(other["top_logprobs"]), "top_logprobs differ")


def none_asked(server: Server) -> None:
    choice = server.chat(logprobs=False).choice()
    require(
        "logprobs" in choice and choice["logprobs"] is None,
        f"logprobs is {choice.get('logprobs', 'not there')}",
    )


def each_choice(server: Server) -> None:
    fields = {"temperature": 2, "seed": 6, "n": 2} | probes.biased(*probes.letters(server))
    answer = _asked(server, **fields)
    for index in range(2):
        text = "".join(item["token"] for item in _items(answer, index))
        require(text == answer.text(index), f"choice {index}: {text!r} is not {answer.text(index)!r}")


def legacy(server: Server, number: int) -> None:
    answer = server.complete(max_tokens=4, logprobs=number)
    found = answer.choice()["logprobs"]
    require(isinstance(found, dict), f"logprobs is {found!r}")
    names = ("tokens", "token_logprobs", "text_offset")
    lengths = [len(found[name]) for name in names]
    require(set(lengths) == {answer.json["usage"]["completion_tokens"]}, f"the lengths are {lengths}")
    require("".join(found["tokens"]) == answer.text(), "the concatenated tokens differ from the text")
    require(all(value <= 0 for value in found["token_logprobs"]), "a logprob is above 0")
    if number:
        tops = found["top_logprobs"]
        require(len(tops) == lengths[0], f"top_logprobs has {len(tops)} items")
        # OpenAI adds the sampled token if it is not among the most likely.
        require(
            all(number <= len(top) <= number + 1 for top in tops), f"they have {[len(top) for top in tops]}"
        )


def text_offsets(server: Server) -> None:
    fields = {"max_tokens": 4, "temperature": 2, "seed": 3, "logprobs": 1}
    answer = server.complete(**fields, **probes.biased(*probes.letters(server)))
    offsets = answer.choice()["logprobs"]["text_offset"]
    first = offsets[0]  # from 0, or from the end of the prompt, as OpenAI has it
    require([offset - first for offset in offsets] == [0, 1, 2, 3], f"they are {offsets}")
    require(first in (0, len(server.fields("/v1/completions")["prompt"])), f"the first is {first}")
