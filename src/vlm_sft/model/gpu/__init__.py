"""Kernels for GPUs, each checked against the plain formula before a run uses it."""
