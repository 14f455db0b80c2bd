"""The training of the embedded base "pocket": pictures, lessons, architecture. Its weights ship with the package."""
