"""Tokens of prompts, from the workers: the API loads no tokenizer."""
