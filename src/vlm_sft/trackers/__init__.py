"""Trackers: what TensorBoard, W&B, MLflow, Trackio get besides metrics. Imports report, errors, artifacts, console."""
