"""Prompts in, text out: templates, detokenizing, stop strings, tool calls."""
