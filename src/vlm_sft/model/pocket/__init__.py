"""The embedded base model "pocket": its shipped weights; tools/pocket trains it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
