"""What methods cost: counted and measured, at equal cost, and up to a target."""
