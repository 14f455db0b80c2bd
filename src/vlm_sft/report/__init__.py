"""Report: renders what runs left on disk; no torch."""
