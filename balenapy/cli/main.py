"""`balenapy VERB …`: docker's verbs and columns, for devices that carry no Go client. Talks to the socket only."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from balenapy.cli.client import Client, ClientError
from balenapy.version import ENGINE_VERSION

USAGE_ERROR = 125  # docker's exit code for wrong usage and for errors of the engine under `run`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        text = f"unknown flag: {unknown[1]}" if unknown else message
        print(f"{text}\nSee '{self.prog} --help'.", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def build_parser() -> argparse.ArgumentParser:
    from balenapy.cli import containers, images, system

    parser = _Parser(
        prog="balenapy",
        allow_abbrev=False,
        description="Client of a balenapy engine. DOCKER_HOST or -H names its socket.",
    )
    parser.add_argument("-H", "--host", default=None, help="unix://PATH or tcp://HOST:PORT")
    parser.add_argument("-v", "--version", action="version", version=f"balenapy version {ENGINE_VERSION}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for part in (containers, images, system):
        part.add_verbs(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the result is the process's exit code."""
    options = build_parser().parse_args(arguments)
    try:
        code = options.run(Client(options.host), options)
        sys.stdout.flush()
    except ClientError as error:
        print(f"balenapy: {error}" if options.verb in ("run",) else error, file=sys.stderr)
        return getattr(error, "exit_code", None) or (USAGE_ERROR if options.verb == "run" else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
