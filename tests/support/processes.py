"""Programs in a process of their own."""

import subprocess


def printed_by(*words, cwd=None, environment=None):
    """What a program prints, which must succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
