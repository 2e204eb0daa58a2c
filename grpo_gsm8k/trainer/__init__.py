"""Who learns: batches, log-probabilities, losses, the optimizer, checkpoints, the step loop."""
