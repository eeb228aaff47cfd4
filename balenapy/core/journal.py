"""The journal's native protocol, and the JSON that `journalctl -o json` prints: both ways of one entry, as bytes.

Fields and their names are those of docker's journald driver (moby daemon/logger/journald); balenaOS reads them.
SYSLOG_TIMESTAMP, CONTAINER_LOG_EPOCH and CONTAINER_LOG_ORDINAL came with later releases of it: the time at which a line
was written, and which line of which run it is.
Source: systemd.io/JOURNAL_NATIVE_PROTOCOL, journalctl(1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from balenapy.core.conmonlog import STAMP_END, STDERR, STDOUT
from balenapy.core.logview import Entry

PRIORITIES = {STDOUT: b"6", STDERR: b"3"}  # journal.PriInfo, journal.PriErr


def field_name(key: str) -> str:
    """A label's or variable's name as the journal takes it. Source: moby sanitizeKeyMod."""
    return re.sub(r"[^A-Z0-9_]", "_", key.upper()).lstrip("_0123456789" if key[:1].isdigit() else "_")


def encode_field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return name + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name + b"=" + value + b"\n"


def encode_entry(entry: Entry, fixed: bytes, epoch: str, ordinal: int) -> bytes:
    """One datagram. `fixed` holds the fields that all entries of the run have, encoded."""
    whole = entry.data.endswith(b"\n")
    return b"".join(
        (
            encode_field(b"MESSAGE", entry.data[:-1] if whole else entry.data),
            b"PRIORITY=",
            PRIORITIES[entry.stream],
            b"\nSYSLOG_TIMESTAMP=",
            entry.stamp[:STAMP_END],
            b"Z\nCONTAINER_LOG_EPOCH=%s\nCONTAINER_LOG_ORDINAL=%d\n" % (epoch.encode(), ordinal),
            b"" if whole else b"CONTAINER_PARTIAL_MESSAGE=true\n",
            fixed,
        )
    )


def fixed_fields(container_id: str, name: str, tag: str, extra: Mapping[str, str]) -> bytes:
    """What all entries of a container have."""
    fields = {
        "CONTAINER_ID": container_id[:12],
        "CONTAINER_ID_FULL": container_id,
        "CONTAINER_NAME": name,
        "CONTAINER_TAG": tag,
        "SYSLOG_IDENTIFIER": tag,
    }
    fields |= {field_name(key): value for key, value in extra.items() if field_name(key)}
    encoded = ((key.encode(), value.encode("utf-8", "surrogateescape")) for key, value in fields.items())
    return b"".join(encode_field(*field) for field in encoded)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    entry: Entry
    cursor: str
    epoch: str
    ordinal: int


def parse_entry(line: bytes) -> JournalEntry | None:
    """One line of journalctl's; None when it is no entry of a container."""
    try:
        found = json.loads(line)
        message = _bytes(found["MESSAGE"])
        stamp = str(found.get("SYSLOG_TIMESTAMP", "")).encode()
        if len(stamp) != STAMP_END + 1:
            from balenapy.core.logview import stamp_of

            stamp = stamp_of(int(found["__REALTIME_TIMESTAMP"]) * 1000)
        stream = STDERR if str(found.get("PRIORITY")) == "3" else STDOUT
        partial = "CONTAINER_PARTIAL_MESSAGE" in found
        return JournalEntry(
            Entry(stamp[:STAMP_END] + b"+00:00", stream, message if partial else message + b"\n"),
            str(found.get("__CURSOR", "")),
            str(found.get("CONTAINER_LOG_EPOCH", "")),
            int(found.get("CONTAINER_LOG_ORDINAL", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _bytes(value: object) -> bytes:
    """Text, or a list of numbers where it is none."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return bytes(value)
    if value is None:
        return b""
    raise TypeError("neither text nor bytes")
