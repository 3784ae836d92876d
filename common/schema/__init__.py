"""JSON schemas as grammars, and what of a schema is refused."""
