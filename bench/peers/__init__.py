"""The peers of the throughput benchmark: their environments, and one program a peer that trains the common work."""
