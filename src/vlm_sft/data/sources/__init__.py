"""Data sources: rows of a data set become samples."""
