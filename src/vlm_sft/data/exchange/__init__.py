"""Data sets in other programs' layouts, in and out."""
