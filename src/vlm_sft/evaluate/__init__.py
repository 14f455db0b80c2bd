"""Metrics, statistics, scoring, comparison, generation."""
