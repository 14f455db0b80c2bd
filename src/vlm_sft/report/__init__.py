"""Report: renders what runs left on disk; no torch. May import artifacts, console, errors, evaluate and forecast."""
