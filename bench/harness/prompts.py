"""Prompts for benchmarks: of about the same length, with long answers."""

from __future__ import annotations

_SUBJECTS = [
    "the sea",
    "a clever fox",
    "an old clock",
    "winter mornings",
    "a lost letter",
    "the city of Paris",
    "a garden robot",
    "mountain villages",
    "the first train",
    "a quiet library",
    "a brave sailor",
    "the northern lights",
    "a talking tree",
    "ancient Rome",
    "an honest thief",
    "the deep forest",
    "a paper boat",
    "desert nights",
    "a broken violin",
    "the last dragon",
    "a busy market",
    "the moon landing",
    "a lighthouse",
    "wild horses",
    "a secret door",
    "the jazz age",
    "a kind giant",
    "thunderstorms",
    "a chess master",
    "the silk road",
    "a tiny island",
    "coffee farms",
]
_KINDS = ("story", "essay", "letter", "speech")


def prompts(num: int, number: int = 0) -> list[str]:
    """`num` different prompts.

    Args:
        number: Prompts of different numbers share no prefix, so that no server has cached them.
    """
    begin = f"{number}. " if number else ""
    return [
        f"{begin}Write a long {_KINDS[i // len(_SUBJECTS) % len(_KINDS)]} about {_SUBJECTS[i % len(_SUBJECTS)]}."
        for i in range(num)
    ]
