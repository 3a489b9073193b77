"""`python -m tensorsleuth` is the command `sleuth`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from .cli.app import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
