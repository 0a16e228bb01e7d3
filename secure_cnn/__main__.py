"""The command's front door: light, so that Ctrl-C is understood while the rest is still loading."""

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line; an interruption that nobody else heard is one line and exit code 130.

    Loading torch and what stands on it takes seconds, in which people change their minds.
    """
    try:
        from secure_cnn.cli import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
