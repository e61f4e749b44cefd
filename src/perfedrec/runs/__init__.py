"""Everything around the algorithm: typed configuration and presets, runs, checkpoints, progress."""
