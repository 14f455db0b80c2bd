"""Checkpoints: written, verified, published, found again."""
