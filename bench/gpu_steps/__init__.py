"""The steps of the GPU check: each one measures something by itself and writes what it has so far."""
