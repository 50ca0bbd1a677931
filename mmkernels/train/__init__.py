"""Training: a loop that survives being killed, data readers, and the `train` and `predict` commands."""
