"""Cached prefixes: prompts that share a beginning with an earlier one prefill only the rest."""
