"""Text of control tokens in data: it is tokenized as text, so that a pasted transcript does not forge a turn.

In each string of a request that contains the text of a control token, a mark is inserted into that text. The template renders the mark
like any other text. The rendered text is split at the marks, and the pieces are tokenized separately. Data without such text is
not touched. Used by `renderer`. Independent of templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from worker.text.templates.alterations import Alterations

MARK = f"q{secrets.token_hex(12)}q"
"""Letters and digits survive what templates do to text, and a client cannot guess it; the token ids do not depend on it."""

MAX_MARKS = 2**17
"""Per prompt, even if its length is not limited: tokenizing the text between two marks takes some 30 microseconds."""

_ANCHOR = "\n"
_ANY_CHARACTER = re.compile(".", re.DOTALL)


def find_control_tokens(tokenizer: Any, markers: Iterable[str | None], template_text: str) -> list[str]:
    """The texts that must not become control tokens if they are in data.

    All special tokens, and of the other added tokens those that the template or the answer's format uses: a vocabulary may have words,
    HTML tags and white space as added tokens (Gemma).

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        markers: Of reasoning and calls.
        template_text: What the template writes.
    """
    known = " ".join(marker for marker in markers if marker)
    found = []
    for added in getattr(tokenizer, "added_tokens_decoder", {}).values():
        token = str(added)
        if len(token) < 2 or token.isspace():  # noqa: PLR2004 (one character cannot be cut)
            continue
        is_used = not token.isalnum() and (token in template_text or token in known)
        if getattr(added, "special", False) or is_used:
            found.append(token)
    return found


class ControlText:
    """See the module.

    Args:
        tokens: See `find_control_tokens`.
        reasoning_markers: The start and the end of reasoning; None: the model does not reason.
        alterations: How text is changed after it was marked.
    """

    def __init__(
        self,
        tokens: list[str],
        reasoning_markers: tuple[str, str] | None = None,
        alterations: Alterations = Alterations(),  # noqa: B008 (immutable)
    ) -> None:
        flags = re.IGNORECASE if alterations.changes_case else re.NOFLAG
        self._pattern = _compile(tokens, flags) if tokens else None
        self._json_pattern = _compile([_in_json(token) for token in tokens], flags) if tokens else None
        self._beginnings = _compile(sorted({token[0] for token in tokens}), flags) if tokens else None
        self._reasoning_markers = reasoning_markers
        self._replaced = alterations.replaced
        self._replaced_in_json = tuple(map(_in_json, alterations.replaced))
        self._normalize = alterations.normalize

    def is_in(self, *values: Any) -> bool:
        """Whether any string of these JSON values may contain the text of a control token."""
        if self._json_pattern is None:
            return False
        if self._normalize is not None:  # of the text, not of its JSON
            return True
        try:
            text = msgspec.json.encode(values).decode()
        except UnicodeEncodeError:  # a lone surrogate
            return True
        return self._json_pattern.search(text) is not None or any(
            each in text for each in self._replaced_in_json
        )

    def mark(self, value: Any) -> Any:
        """Insert marks into all strings of a JSON value, keys of objects included."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return value

    def mark_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Insert marks into a message. The markers of reasoning at the beginning of an assistant's text stay: the model wrote them."""
        marked = {key: item if key == "role" else self.mark(item) for key, item in message.items()}
        content = message.get("content")
        if self._reasoning_markers is None or message["role"] != "assistant" or not isinstance(content, str):
            return marked
        start, end = self._reasoning_markers
        if content.lstrip().startswith(start) and end in content:
            space, _, rest = content.partition(start)
            reasoning, _, answer = rest.partition(end)
            marked["content"] = f"{space}{start}{self._mark_text(reasoning)}{end}{self._mark_text(answer)}"
        return marked

    def _mark_text(self, text: str) -> str:
        pattern = self._cut_pattern(text)
        if pattern is None:
            return text
        pieces, begin, found = [], 0, pattern.search(text)
        while found is not None:
            cut = found.start() + 1
            pieces.append(text[begin:cut])
            begin, found = cut, pattern.search(text, cut)  # tokens may overlap
        return MARK.join([*pieces, text[begin:]]) if pieces else text

    def _cut_pattern(self, text: str) -> re.Pattern[str] | None:
        """What a text is cut after: the first characters of control tokens, or more if it may still change."""
        if self._pattern is None:
            return None
        if self._normalize is not None and self._pattern.search(self._normalize(text)) is not None:
            return _ANY_CHARACTER
        return self._beginnings if any(each in text for each in self._replaced) else self._pattern


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def encode(text: str, tokenizer: Any, *, add_special_tokens: bool = False) -> list[int]:
    """Tokenize a rendered text; no token spans the position of a mark.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        add_special_tokens: Whether the tokenizer adds its tokens at the beginning and at the end.
    """
    # Without the argument if it is the default: some models' own tokenizers do not have it.
    options = {} if add_special_tokens else {"add_special_tokens": False}
    if MARK not in text:
        return list(tokenizer.encode(text, **options))
    pieces = text.split(MARK)
    first = list(tokenizer.encode(pieces[0], add_special_tokens=False))
    complete = list(tokenizer.encode(pieces[0], **options))
    begin = next((i for i in range(len(complete)) if complete[i : i + len(first)] == first), 0)
    known: dict[str, list[int]] = {}
    encode_piece = _piece_encoder(tokenizer)
    ids = complete[: begin + len(first)]
    for piece in pieces[1:]:
        if piece not in known:
            known[piece] = encode_piece(piece)
        ids += known[piece]
    return ids + complete[begin + len(first) :]


def num_marks(text: str) -> int:
    """The number of marks in a text; it has about as many tokens at least."""
    return text.count(MARK)


def remove_marks(text: str) -> str:
    """The text as the client wrote it."""
    return text.replace(MARK, "")


def _piece_encoder(tokenizer: Any) -> Any:
    """A function that tokenizes a text that is not the beginning of the prompt."""

    def encode_plain(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    anchor = encode_plain(_ANCHOR)
    if anchor + encode_plain("a") == encode_plain(f"{_ANCHOR}a"):
        return encode_plain

    def encode_after_anchor(text: str) -> list[int]:
        """For vocabularies that begin each text with a space (sentencepiece's dummy prefix)."""
        ids = encode_plain(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode_plain(text)

    return encode_after_anchor


def _compile(tokens: list[str], flags: re.RegexFlag) -> re.Pattern[str]:
    """A pattern that finds the texts in one pass, whatever their number: alternatives share their beginnings."""
    trie: dict[str, Any] = {}
    for token in tokens:
        node = trie
        for char in token:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_pattern_of(trie), flags)


def _pattern_of(trie: dict[str, Any]) -> str:
    if "" in trie:  # the shortest token is enough
        return ""
    branches = []
    for char, node in trie.items():
        text = re.escape(char)
        while len(node) == 1 and "" not in node:
            ((char, node),) = node.items()  # noqa: PLW2901
            text += re.escape(char)
        branches.append(text + _pattern_of(node))
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
