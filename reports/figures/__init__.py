"""What figures share: their style, frames, labels and files; the curves, and the samples."""
