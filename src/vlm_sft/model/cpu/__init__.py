"""Modules of a model exchanged for ones that are faster on CPUs, with the same values."""
