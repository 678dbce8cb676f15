"""Many runs: who runs which, side by side, and what is shown meanwhile."""
