"""Data: samples, their sources, encoding, packing and collation."""
