"""Messages of the syslog driver, and what its options mean.

The form is RFC 5424's unless `syslog-format` says otherwise; over TLS each message has its length before it (RFC 5425),
over plain TCP it ends with a newline (RFC 6587, 3.4.2), in a datagram it stands alone.
Source of option names and refusals: moby daemon/logger/syslog.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from balenapy.core.conmonlog import STAMP_END, STDERR
from balenapy.core.logview import Entry
from balenapy.errors import InvalidParameter

OPTIONS = frozenset(
    (
        "env", "env-regex", "labels", "syslog-address", "syslog-facility", "syslog-tls-ca-cert", "syslog-tls-cert",
        "syslog-tls-key", "syslog-tls-skip-verify", "tag", "syslog-format",
    )
)  # fmt: skip
_FACILITIES = (
    "kern user mail daemon auth syslog lpr news uucp cron authpriv ftp - - - - "
    "local0 local1 local2 local3 local4 local5 local6 local7"
).split()
FACILITIES = {name: number for number, name in enumerate(_FACILITIES) if name != "-"}
FORMATS = ("rfc5424", "rfc5424micro", "rfc3164")
STREAM_SCHEMES = ("tcp", "tcp+tls", "unix")
LOCAL_PATHS = ("/dev/log", "/var/run/syslog", "/var/run/log")  # srslog's
DEFAULT_PORT = 514
_INFO, _ERROR = 6, 3
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


@dataclass(frozen=True, slots=True)
class Target:
    """Where messages go."""

    scheme: str  # unix, unixgram, udp, tcp, tcp+tls; "": the local daemon
    host: str = ""  # or the path of a socket
    port: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    target: Target
    facility: int
    form: str
    ca_cert: str = ""
    cert: str = ""
    key: str = ""
    skip_verify: bool = False


def parse_settings(options: Mapping[str, str]) -> Settings:
    """Raises: InvalidParameter."""
    form = options.get("syslog-format") or "rfc5424"
    if form not in FORMATS:
        raise InvalidParameter("Invalid syslog format")
    return Settings(
        parse_address(options.get("syslog-address", "")),
        _facility(options.get("syslog-facility") or "daemon"),
        form,
        options.get("syslog-tls-ca-cert", ""),
        options.get("syslog-tls-cert", ""),
        options.get("syslog-tls-key", ""),
        "syslog-tls-skip-verify" in options,
    )


def parse_address(text: str) -> Target:
    """Raises: InvalidParameter."""
    if not text:
        return Target("")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("unix", "unixgram", "udp", "tcp", "tcp+tls"):
        raise InvalidParameter(f"syslog-address should be in form proto://address, got {text}")
    if scheme.startswith("unix"):
        if not rest.startswith("/"):
            raise InvalidParameter(f"invalid syslog address: {text}")
        return Target(scheme, rest)
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\[\]]+)(?::(\d{1,5}))?", rest)
    if match is None or int(match[2] or DEFAULT_PORT) not in range(1, 65536):
        raise InvalidParameter(f"invalid syslog address: {text}")
    return Target(scheme, match[1].strip("[]"), int(match[2] or DEFAULT_PORT))


def _facility(text: str) -> int:
    if text in FACILITIES:
        return FACILITIES[text]
    if text.isdigit() and 0 <= int(text) <= 23:
        return int(text)
    raise InvalidParameter("invalid syslog facility")


def format_message(entry: Entry, settings: Settings, hostname: str, tag: str, pid: int) -> bytes:
    """One message, with what divides it from the next on this transport."""
    priority = settings.facility * 8 + (_ERROR if entry.stream == STDERR else _INFO)
    text = entry.data.removesuffix(b"\n")
    stamp = entry.stamp[:STAMP_END]
    name = _printable(tag, 48)
    if settings.form == "rfc3164":
        moment = stamp.decode()
        at = f"{_MONTHS[int(moment[5:7]) - 1]} {int(moment[8:10]):2} {moment[11:19]}"
        head = f"<{priority}>{at} {_printable(hostname, 255)} {name}[{pid}]: "
    else:
        # TIME-SECFRAC has at most six digits.
        digits = b"" if settings.form == "rfc5424" else stamp[19:26]
        moment = (stamp[:19] + (digits or stamp[19:23]) + b"Z").decode()
        head = f"<{priority}>1 {moment} {_printable(hostname, 255)} {name} {pid} {_printable(tag, 32)} - "
    message = head.encode() + text
    if settings.target.scheme == "tcp+tls" and settings.form != "rfc3164":
        return b"%d %s" % (len(message), message)
    if settings.target.scheme in STREAM_SCHEMES:
        return message.replace(b"\n", b" ") + b"\n"
    return message


def _printable(text: str, limit: int) -> str:
    """PRINTUSASCII without blanks; `-` for nothing."""
    return re.sub(r"[^!-~]", "_", text)[:limit] or "-"
