"""Several processes: how they were launched, how they meet, how they end."""
