"""JSON Schemas as grammars, and limits on what clients may send."""
