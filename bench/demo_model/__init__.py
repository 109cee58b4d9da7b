"""The demo checkpoint: its drawn world, its training and its evaluation."""
