"""What test modules share: networks, data, oracles and records. No test stands here."""
