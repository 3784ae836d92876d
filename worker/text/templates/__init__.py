"""Chat templates: what one supports, how a conversation is adapted to it, and text that must not become control tokens."""
