"""Shared by benchmarks and tests: private pools, a synthetic worker, a proxy, CPU meters, tables."""
