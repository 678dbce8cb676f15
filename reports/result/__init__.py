"""Which method is better, and by how much."""
