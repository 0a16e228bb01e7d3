"""A sequence of checkpoints in one folder, saved beside the loop, that notices a rollback."""
