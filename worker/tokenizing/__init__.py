"""Replies to requests for the tokens of a prompt, which need no slot: the tokenizing thread."""
