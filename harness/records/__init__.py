"""What a run leaves behind. Free of torch and pandas: all that `reports` may import of `harness`."""
