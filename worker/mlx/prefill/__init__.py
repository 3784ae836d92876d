"""Prefill: how much is prefilled between two decode steps, the batch of prompts, and their caches."""
