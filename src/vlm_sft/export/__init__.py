"""Folders that other programs open: merged models, adapters, cards. Imports data, model, evaluate, launch, record."""
