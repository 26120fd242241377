"""Training: options and presets, the stages, the one loop, checkpoints, randomness, logs."""
