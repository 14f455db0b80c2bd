"""Report: renders what runs left on disk; no torch. May import artifacts, console, data, errors, evaluate, forecast."""
