"""Training: `train.train(runs)`; those whose images fit in memory in `resident`, the large sets in `streaming`."""
