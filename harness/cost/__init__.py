"""What a step costs: operations, counted, and memory, worked out before it is taken."""
