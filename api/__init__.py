"""The OpenAI-compatible HTTP server: turns requests into jobs and their events into responses. Loads no model."""
