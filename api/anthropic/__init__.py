"""Anthropic's protocol, version 2023-06-01: requests parsed, answers rendered."""
