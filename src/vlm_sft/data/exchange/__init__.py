"""Data sets in other programs' layouts, in and out. Imports the rest of this room, errors, artifacts and console."""
