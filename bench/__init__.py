"""Benchmarks: what users would measure, against peers, in one run. See RESULTS.md."""
