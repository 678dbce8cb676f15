"""What methods would cost: estimated, rehearsed without data, or measured."""
