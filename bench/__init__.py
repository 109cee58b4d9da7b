"""Benchmarks, quality measures and the training of the demo checkpoint. Nothing imports this package."""
