"""secure_cnn."""
