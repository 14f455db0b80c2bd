"""Recipes: the keys of a run, their rules and their schedule."""
