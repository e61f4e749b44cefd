"""A run: its configuration and presets, the training loop, the run folder with checkpoints, progress, trackers."""
