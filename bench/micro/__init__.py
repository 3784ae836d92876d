"""Benchmarks of single parts of the worker, without a model."""
