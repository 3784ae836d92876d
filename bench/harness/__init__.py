"""What benchmarks share: private pools, a worker without a model, meters."""
