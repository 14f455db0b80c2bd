"""Training: arguments, the trainer, callbacks, the run."""
