"""Who learns: batches, log-probabilities, objectives, the optimizer, checkpoints, the step loop."""
