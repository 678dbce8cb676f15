"""The self-contained page of a study."""
