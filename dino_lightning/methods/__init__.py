"""Pre-training methods, one a file."""
