"""Folders that other programs open: merged models, adapters, cards."""
