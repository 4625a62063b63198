"""Training: `resident.train(runs)` for images that fit in the device's memory; recipe, step, evaluation, checkpoint."""
