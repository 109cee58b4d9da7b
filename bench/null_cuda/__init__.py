"""A CUDA device that computes nothing, under PyTorch's own CUDA build: see `driver.c` and `python -m
latentrt.bench.null_cuda --help`."""
