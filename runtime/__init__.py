"""The runtime: from a prompt to an image. `pipeline.py` is the place to start reading."""
