"""The networks of a Stable Diffusion checkpoint, in PyTorch over `latentrt.kernels`."""
