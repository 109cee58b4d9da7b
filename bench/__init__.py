"""Benchmarks, quality measures and the training of the demo checkpoint. Only the command line imports this package."""
