"""What is done once for the repository, and is not part of the package."""
