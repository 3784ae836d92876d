"""What the checks need to know about a model's tokens: a few ids and their text.

Requested once and cached; found through `logit_bias`, so that they work with any server that supports it.
"""

from __future__ import annotations

from typing import Any

from tests.conformance.server import LEGACY, NotShown, Server, require

_LETTER_IDS = range(40, 80)
"""Byte-pair vocabularies and byte fallbacks have ASCII characters in this range."""

_WORD_IDS = range(400, 2400, 61)
_NUM_LETTERS = 8
_FORCED = 100


def letters(server: Server) -> dict[int, str]:
    """Eight token ids, each with its one-character text.

    Raises:
        NotShown: They cannot be found.
    """
    if "letters" not in server.probed:
        found: dict[int, str] = {}
        for token_id in _LETTER_IDS:
            text = _forced(server, token_id, 2)
            if len(text) == 2 and text[0] == text[1] and text.isprintable() and text[0] not in found.values():
                found[token_id] = text[0]
            if len(found) == _NUM_LETTERS:
                break
            require(
                found or token_id < _LETTER_IDS[5],
                "logit_bias forces no token, so this cannot be checked",
            )
        server.probed["letters"] = found
    return _enough(server.probed["letters"], _NUM_LETTERS)


def word(server: Server) -> tuple[int, str]:
    """A token id and its text, which contains at least three different ASCII letters in a row.

    Raises:
        NotShown: None is found.
    """
    letters(server)
    if "word" not in server.probed:
        for token_id in _WORD_IDS:
            twice = _forced(server, token_id, 2)
            text = twice[len(twice) // 2 :]
            core = text.strip()
            if (
                twice.strip() == (text + text).strip()
                and core.isascii()
                and core.isalpha()
                and len(set(core)) > 2
            ):
                server.probed["word"] = (token_id, text)
                break
        else:
            raise NotShown("no token of three letters was found")
    found: tuple[int, str] = server.probed["word"]
    return found


def biased(*token_ids: int) -> dict[str, Any]:
    """Request fields that force an answer of these tokens."""
    return {"logit_bias": {str(token_id): _FORCED for token_id in token_ids}}


def non_ascii(server: Server) -> dict[str, Any]:
    """Request fields of a greedy completion whose text has non-ASCII characters.

    Raises:
        NotShown: The model generates none.
    """
    return _that_says(server, "non_ascii", ("é é é é é é é é é é", "ü, ü, ü, ü, ü, ü, ü, ü,"))


def emoji(server: Server) -> dict[str, Any]:
    """Request fields of a greedy completion whose text has characters that span several tokens.

    Raises:
        NotShown: As `non_ascii`.
    """
    return _that_says(server, "emoji", ("😀 😀 😀 😀 😀 😀 😀 😀", "𝄞𝄞𝄞𝄞𝄞𝄞𝄞𝄞"))


def _that_says(server: Server, name: str, prompts: tuple[str, ...]) -> dict[str, Any]:
    if name not in server.probed:
        for prompt in prompts:
            fields = {"prompt": prompt, "max_tokens": 8}
            if any(c in prompt and not c.isascii() for c in server.post(LEGACY, fields).text()):
                server.probed[name] = fields
                break
        else:
            raise NotShown(f"the model does not continue with {prompts[0][0]}")
    found: dict[str, Any] = server.probed[name]
    return found


def _forced(server: Server, token_id: int, times: int) -> str:
    return server.chat(max_tokens=times, **biased(token_id)).text()


def _enough(found: dict[int, str], wanted: int) -> dict[int, str]:
    require(len(found) >= wanted, f"only {len(found)} tokens of one character were found with logit_bias")
    return found
