"""Prefill: how much is prefilled between two decode steps, and the batches of prompts."""
