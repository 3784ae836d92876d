"""The part of PyTorch that guidellm needs to read its prompts, so that a load test does not install six gigabytes of it.

Everything that talks to the server is guidellm's own. Only the process that `test_guidellm` starts has it on its path.
"""

from __future__ import annotations

from torch import utils

__all__ = ["Generator", "utils"]


class Generator:
    """Accepts a seed without using it: our loader keeps the order."""

    def manual_seed(self, seed: int) -> Generator:
        """As torch's."""
        return self
