"""The keys and values of sequences: a model's own caches, those of prompts that prefill, and the slots of sequences that decode."""
