"""Lightning callbacks and loggers: progress, checkpoints, reports, changes of the network during training."""
