"""`reasoning.encrypted_content`: a model's thoughts in an opaque form, which stateless clients send back with the next turn.

The thoughts are encoded, not encrypted: the client has them anyway. Used by the rendering and by the parser of items.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "mlxpool1."


def encode_thoughts(text: str) -> str:
    """The opaque form."""
    return _PREFIX + base64.b64encode(text.encode()).decode()


def decode_thoughts(encoded: str) -> str | None:
    """The thoughts; None if another server wrote this."""
    if not encoded.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(encoded[len(_PREFIX) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
