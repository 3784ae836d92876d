"""Cost of grammars: compilation, one mask, and one token for a batch of 16, also as a share of a decode step.

`python -m bench.grammar` uses the demo model's vocabulary; `--large` adds a synthetic one of 150,000 tokens. Tokens are drawn at
random from those that the mask allows, so that each step computes a different mask.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.harness.table import Table, percentile, say
from common.protocol import ToolUse
from common.schema import grammar
from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.models import demo_model
from worker.sampling.arrays import apply_mask
from worker.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, num_words

BATCH = 16
NUM_STEPS = 200
CPU_STEP_SECONDS = 0.150
GPU_STEP_SECONDS = 0.009

_KINDS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
    {"enum": ["a", "b", "c"]},
]
_FIELDS = {f"field_{i}": _KINDS[i % 4] for i in range(10)}
_TREE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/Node",
}
_RECORD = {"type": "object", "properties": _FIELDS, "required": [*_FIELDS], "additionalProperties": False}
_TOOLS = [{"type": "function", "function": {"name": f"tool_{i}", "parameters": _RECORD}} for i in range(5)]
GRAMMARS: dict[str, Callable[[], str]] = {
    "json_object": grammar.for_json_object,
    "10 fields": lambda: grammar.for_json_schema(_RECORD),
    "recursive": lambda: grammar.for_json_schema(_TREE),
    "5 tools, auto": lambda: grammar.for_tool_calls(ToolUse(tools=_TOOLS)),
    "5 tools, required": lambda: grammar.for_tool_calls(ToolUse(tools=_TOOLS, is_required=True)),
}


def main(argv: list[str] | None = None) -> None:
    """Measure each grammar with each vocabulary."""
    parser = argparse.ArgumentParser(prog="python -m bench.grammar", description=main.__doc__)
    parser.add_argument(
        "--large",
        action="store_true",
        help="also with a vocabulary of 150,000 tokens, which takes a minute to generate",
    )
    arguments = parser.parse_args(argv)
    folder = demo_model.ensure_demo_model(Settings.load().cache_dir)
    loaded = mlx_model.load_model(Settings(model=str(folder)))
    vocabularies = {"demo": loaded.tokenizer} | ({"large": _large()} if arguments.large else {})
    table = Table(
        [
            "vocabulary, grammar",
            *(
                "check ms",
                "compile ms",
                "cached µs",
                "mask µs",
                "p99 µs",
                "advance µs",
                "apply ms",
                "token ×16 ms",
            ),
            f"of {CPU_STEP_SECONDS * 1e3:.0f} ms",
            f"of {GPU_STEP_SECONDS * 1e3:.0f} ms",
        ]
    )
    for name, tokenizer in vocabularies.items():
        size = len(tokenizer.get_vocab())
        start = time.perf_counter()
        grammars = GrammarCompiler(tokenizer, size, [0])
        say(f"{name}: {size} tokens, prepared in {time.perf_counter() - start:.2f} s, once per model\n")
        GrammarMatcher(grammars.compile(grammar.for_json_schema({"const": 1}))).allowed()
        for kind, make in GRAMMARS.items():
            table.add([f"{name}, {kind}", *_measured(grammars, make)])


def _measured(grammars: GrammarCompiler, make: Callable[[], str]) -> list[str]:
    check = _seconds(lambda: grammar.check(make()))
    text = make()
    compile_first = _seconds(lambda: grammars.compile(text))
    compile_again = _seconds(lambda: grammars.compile(text))
    masks, advances, applies, steps = _steps(grammars.compile(text), grammars)
    step = statistics.mean(steps)
    return [
        f"{check * 1e3:.2f}",
        f"{compile_first * 1e3:.2f}",
        f"{compile_again * 1e6:.1f}",
        f"{statistics.mean(masks) * 1e6:.0f}",
        f"{percentile(masks, 99) * 1e6:.0f}",
        f"{statistics.mean(advances) * 1e6:.1f}",
        f"{statistics.mean(applies) * 1e3:.2f}",
        f"{step * 1e3:.2f}",
        f"{step / CPU_STEP_SECONDS:.1%}",
        f"{step / GPU_STEP_SECONDS:.1%}",
    ]


def _steps(compiled: CompiledGrammar, grammars: GrammarCompiler) -> tuple[list[float], ...]:
    """Seconds of each mask, of each advance by a token, of each application of all masks, and of each whole step."""
    draw = random.Random(1)  # noqa: S311 (not for security)
    matchers = [GrammarMatcher(compiled) for _ in range(BATCH)]
    words = np.zeros((BATCH, num_words(grammars.vocab_size)), np.uint32)
    logits = np.random.default_rng(1).standard_normal((BATCH, grammars.vocab_size), np.float32)
    masks: list[float] = []
    advances: list[float] = []
    applies: list[float] = []
    for _ in range(NUM_STEPS):
        masks += [
            _seconds(functools.partial(matcher.fill, out))
            for matcher, out in zip(matchers, words, strict=True)
        ]
        applies.append(_seconds(lambda: apply_mask(words, logits)))
        for i, allowed in enumerate(np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")):
            token_id = int(draw.choice(np.flatnonzero(allowed)))
            advances.append(_seconds(functools.partial(matchers[i].advance, token_id)))
            if matchers[i].is_finished:
                matchers[i] = GrammarMatcher(compiled)
    matcher_seconds = [
        sum(masks[i : i + BATCH]) + sum(advances[i : i + BATCH]) for i in range(0, BATCH * NUM_STEPS, BATCH)
    ]
    return masks, advances, applies, [a + b for a, b in zip(matcher_seconds, applies, strict=True)]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _large() -> Any:
    """A byte-level BPE tokenizer with 150,000 tokens, merged at random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    draw = random.Random(1)  # noqa: S311 (not for security)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<end>", *alphabet]
    merges: list[tuple[str, str]] = []
    letters = [*"etaoinshrdlucmfwypvbgkjqxzETAOINSR0123456789Ġ\"{}[]:,._-/\\'", *alphabet]
    parts, known = [*letters], set(vocabulary)
    while len(vocabulary) < 150_000:  # noqa: PLR2004
        left, right = draw.choice(parts), draw.choice(letters if draw.random() < 0.5 else parts)  # noqa: PLR2004
        if len(left + right) <= 12 and left + right not in known:  # noqa: PLR2004
            known.add(left + right)
            vocabulary.append(left + right)
            parts.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return SimpleNamespace(
        backend_tokenizer=tokenizer,
        detokenizer=SimpleNamespace(tokenmap=vocabulary),
        added_tokens_decoder=tokenizer.get_added_tokens_decoder(),
        get_vocab=tokenizer.get_vocab,
    )


if __name__ == "__main__":
    main()
