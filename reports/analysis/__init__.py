"""What a report holds of `ditbench analyze`."""
