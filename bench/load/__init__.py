"""Load on any OpenAI-compatible server."""
