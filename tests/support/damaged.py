"""Files whose bytes were changed at random."""

import numpy as np


def damaged(path, *, times, places):
    """Changes so many random bytes of a file, so many times, each time from the whole file."""
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    for _ in range(times):
        copy = whole.copy()
        copy[random.integers(0, len(whole), places)] = random.integers(0, 256, places)
        path.write_bytes(copy.tobytes())
        yield
