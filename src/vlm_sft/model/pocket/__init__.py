"""The embedded base model "pocket": its build, training, shipped weights."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
