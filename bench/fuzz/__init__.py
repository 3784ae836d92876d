"""Fuzzing with nearly valid request bodies."""
