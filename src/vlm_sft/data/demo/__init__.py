"""Synthetic demo data: charts and signs drawn by our own generator."""
