"""Benchmarks of what users notice, against peer servers in the same run. Results are in RESULTS.md."""
