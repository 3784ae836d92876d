"""HTTP in, events out: the OpenAI-compatible server. Loads no model."""
