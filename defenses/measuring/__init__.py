"""What a measurement stands on: images, seeds, counts and intervals, state files, verdicts."""
