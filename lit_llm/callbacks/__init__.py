"""When, during a run: progress, checkpoints, reports."""
