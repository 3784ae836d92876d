"""Runs a pool on one machine: `make up`, the embedded Redis, supervision."""
