"""The part of PyTorch that guidellm needs to read its prompts, so that a load test does not install six gigabytes of it.

Everything that talks to the server is guidellm's own. First in the path of `test_guidellm`'s process only.
"""

from __future__ import annotations

from torch import utils

__all__ = ["Generator", "utils"]


class Generator:
    """A seed, which the loader below does not need: it keeps the order."""

    def manual_seed(self, seed: int) -> Generator:
        """As torch's."""
        return self
