"""Trackers: what TensorBoard, W&B, MLflow, Trackio get besides metrics."""
