"""`python -m balenapy` and `balenapyd`: arguments, then `daemon.run`."""

from __future__ import annotations

import sys


def main() -> int:
    from balenapy import config
    from balenapy.config import UsageError

    try:
        parsed = config.parse(sys.argv[1:])
    except UsageError as error:
        print(error.message, file=sys.stderr)
        return 125  # what dockerd answers to wrong usage
    # Before anything imports Trio.
    from balenapy import lean

    lean.load("trio")
    from balenapy import daemon

    return daemon.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
