"""What a report holds of a final evaluation."""
