"""The signature of a thinking block, which clients send back with it.

Anthropic's proves where the thoughts come from. Ours proves nothing: thoughts are the client's own data. If the client asked for
thinking blocks without their text, it carries the text, so that the next turn has it. Used by the rendering and the parser.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_PREFIX = "mlxpool."
_NUM_DIGEST_BYTES = 24


def of_shown(key: str) -> str:
    """For a block whose text is shown.

    Args:
        key: Unique to the block; the same gives the same signature.
    """
    return base64.b64encode(hashlib.sha256(key.encode()).digest()[:_NUM_DIGEST_BYTES]).decode()


def of_omitted(thoughts: str) -> str:
    """For a block whose text is not shown."""
    return _PREFIX + base64.b64encode(thoughts.encode()).decode()


def thoughts(signature: str) -> str:
    """The text that a signature carries; empty for one that carries none."""
    if not signature.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
