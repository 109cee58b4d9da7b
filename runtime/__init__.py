"""The runtime: from a prompt to an image. `flow.py` is the place to start reading."""
