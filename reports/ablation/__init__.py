"""What a report holds of an ablation."""
