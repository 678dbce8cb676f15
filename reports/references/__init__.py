"""Reference curves of shipped presets, and runs held to them."""
