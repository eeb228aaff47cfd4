"""`balenapy VERB …`: docker's verbs and columns, for devices that carry no Go client. Talks to the socket only."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from balenapy.version import ENGINE_VERSION

USAGE_ERROR = 125  # docker's exit code for unknown flags, bad values and for errors of the engine under `run`
# docker's verbs by the object they are about; all others have the same name there.
GROUPS = {
    "container": {"ls": "ps", "list": "ps", "remove": "rm"},
    "image": {"ls": "images", "list": "images", "rm": "rmi", "remove": "rmi"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        code = USAGE_ERROR
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            message = f"unknown flag: {unknown[1]}"
            if not unknown[1].startswith("-"):
                message, code = f"'{self.prog}' does not take the argument {unknown[1]!r}", 1
        elif verb := re.match(r"argument VERB: invalid choice: '(.*?)'", message):
            message, code = f"unknown command: {self.prog} {verb[1]}", 1
        elif message.startswith("the following arguments are required: "):
            message, code = f"'{self.prog}' requires {message.partition(': ')[2]}", 1
        print(f"{message}\nSee '{self.prog} --help'.", file=sys.stderr)
        sys.exit(code)


def build_parser() -> argparse.ArgumentParser:
    from balenapy.cli import containers, copy, firewall, images, observe, system

    parser = _Parser(
        prog="balenapy",
        allow_abbrev=False,
        description="Client of a balenapy engine. DOCKER_HOST or -H names its socket.",
    )
    parser.add_argument("-H", "--host", default=None, help="unix://PATH or tcp://HOST:PORT")
    parser.add_argument("-v", "--version", action="version", version=f"balenapy version {ENGINE_VERSION}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    verbs.add_parser("healthcheck", help="exit with 0 when the engine answers")  # taken by `main`
    for part in (containers, copy, images, firewall, observe, system):
        part.add_verbs(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the result is the process's exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["healthcheck"]:  # before anything heavy is imported
        from balenapy.cli import health

        return health.run(words[1:])
    from balenapy.cli.client import Client, ClientError

    options = build_parser().parse_args(_without_group(words))
    try:
        code = options.run(Client(options.host), options)
        sys.stdout.flush()
    except ClientError as error:
        print(f"balenapy: {error}" if options.verb in ("run",) else error, file=sys.stderr)
        return error.exit_code or (USAGE_ERROR if options.verb == "run" else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return int(code or 0)


def _without_group(arguments: Sequence[str]) -> Sequence[str]:
    """`container ls` -> `ps`."""
    for index, word in enumerate(arguments[:-1]):
        if word in GROUPS and (index == 0 or arguments[0] in ("-H", "--host") or arguments[0].startswith("--host=")):
            verb = arguments[index + 1]
            return [*arguments[:index], GROUPS[word].get(verb, verb), *arguments[index + 2 :]]
        if index >= 2:
            break
    return arguments


if __name__ == "__main__":
    sys.exit(main())
