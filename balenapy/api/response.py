"""What a handler returns: a whole answer, or a stream that is produced while the client reads.

The third form, raw bytes both ways, is `api.hijack.Hijack`. Quart's response class is not used: the reference engine's
heads are exact bytes (order and spelling included), and most answers are small enough to leave in one packet.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from time import gmtime, time
from typing import Any, Protocol

from balenapy.core import gojson

Headers = list[tuple[bytes, bytes]]

REASON: dict[int, bytes] = {status.value: status.phrase.encode() for status in HTTPStatus}

# Not strftime: a header must not follow the locale.
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class BodyWriter(Protocol):
    """Sends one piece of the body and waits until the kernel took it. The first one sends the head too."""

    @property
    def started(self) -> bool:
        """Whether the head was sent: afterwards an error can only be told inside the stream."""

    async def __call__(self, data: bytes, /) -> None: ...


Produce = Callable[[BodyWriter], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Response:
    """A whole answer. Header names are spelled as on the wire (`Content-Type`)."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sniffed_type: str = ""  # a type the reference engine's HTTP library guessed: it comes last in the head

    def head(self, engine_headers: Mapping[str, str]) -> Headers:
        """The head's fields in the order Go writes them: by name, then the library's own."""
        fields = _sorted({**self.headers, **engine_headers})
        fields.append(_date())
        if self.status not in (204, 304):
            fields.append((b"Content-Length", b"%d" % len(self.body)))
        if self.sniffed_type:
            fields.append((b"Content-Type", self.sniffed_type.encode("latin-1")))
        return fields


@dataclass(slots=True, eq=False)
class StreamResponse:
    """An answer of unknown length, made by `produce` in the request's own task.

    Attributes:
        head_first: send the head before `produce` runs (logs, events, wait). Otherwise the head leaves with the
            first piece, and an EngineError raised before that is an ordinary error answer (pull, build).
    """

    produce: Produce
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    head_first: bool = True

    def head(self, engine_headers: Mapping[str, str]) -> Headers:
        return [*_sorted({**self.headers, **engine_headers}), _date()]


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """One JSON value and a newline, as the reference engine's `WriteJSON`."""
    return Response(status, gojson.dumps(value) + b"\n", {"Content-Type": "application/json", **(headers or {})})


def empty_response(status: int = 204, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, headers=dict(headers or {}))


def text_response(text: str, status: int = 200) -> Response:
    return Response(status, text.encode(), sniffed_type="text/plain; charset=utf-8")


def stream_response(
    source: Produce | AsyncIterable[bytes],
    content_type: str | None = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    head_first: bool = True,
) -> StreamResponse:
    """Stream from `async def produce(write): await write(b"…")`, or from a channel or other async iterable of bytes.

    `produce` is the better form when something must run meanwhile: it may open nurseries, it is cancelled when the
    client goes away, and what it raises before the first `write` becomes an error answer (with `head_first=False`).
    An iterable is closed at the end whatever happens.
    """
    if callable(source):
        produce: Produce = source
    else:
        iterable = source

        async def produce(write: BodyWriter) -> None:
            async with AsyncExitStack() as stack:
                if (aclose := getattr(iterable, "aclose", None)) is not None:
                    stack.push_async_callback(aclose)
                async for data in iterable:
                    await write(data)

    fields = dict(headers or {})
    if content_type is not None:
        fields["Content-Type"] = content_type
    return StreamResponse(produce, status, fields, head_first)


def error_response(status: int, message: str, *, plain: bool = False) -> Response:
    """`{"message":"…"}`, or plain text for clients of API 1.23 and older."""
    if status == 304:
        return Response(304)
    if plain:
        headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
        return Response(status, message.encode() + b"\n", headers)
    return json_response({"message": message}, status)


def _sorted(headers: Mapping[str, str]) -> Headers:
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in sorted(headers.items())]


_date_cache = (0, b"")


def _date() -> tuple[bytes, bytes]:
    global _date_cache
    now = int(time())
    if _date_cache[0] != now:
        at = gmtime(now)
        text = (
            f"{DAYS[at.tm_wday]}, {at.tm_mday:02} {MONTHS[at.tm_mon - 1]} {at.tm_year} "
            f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT"
        )
        _date_cache = (now, text.encode("ascii"))
    return b"Date", _date_cache[1]
