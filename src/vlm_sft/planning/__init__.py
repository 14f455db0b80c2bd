"""What a training will do and take, before it starts: options, data, packs, forecast."""
