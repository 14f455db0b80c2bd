"""Time, memory and disk of a run before it starts, and which recipe to take."""
