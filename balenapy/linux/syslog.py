"""Connections of the syslog driver: unix, UDP, TCP and TLS."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core.syslog import LOCAL_PATHS, Settings, Target
from balenapy.errors import SystemFailure

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 1.0


class SyslogConnection:
    """One connection. After an error it is of no use any more."""

    def __init__(self, stream: trio.abc.SendStream | None, datagrams: trio.socket.SocketType | None) -> None:
        self._stream = stream
        self._datagrams = datagrams

    @classmethod
    async def open(cls, settings: Settings) -> SyslogConnection:
        """Raises: SystemFailure."""
        target = settings.target
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                if target.scheme in ("", "unix", "unixgram"):
                    return await cls._open_unix(target)
                if target.scheme == "udp":
                    return cls(None, await _open_udp(target))
                stream: trio.abc.Stream = await trio.open_tcp_stream(target.host, target.port)
                if target.scheme == "tcp+tls":
                    secure = trio.SSLStream(stream, _context(settings), server_hostname=target.host)
                    await secure.do_handshake()
                    stream = secure
                return cls(stream, None)
        except trio.TooSlowError as error:
            raise SystemFailure(f"dial {_shown(target)}: i/o timeout") from error
        except (OSError, trio.BrokenResourceError) as error:
            raise SystemFailure(f"dial {_shown(target)}: {_words(error)}") from error

    @classmethod
    async def _open_unix(cls, target: Target) -> SyslogConnection:
        kinds = {"unix": (socket.SOCK_STREAM,), "unixgram": (socket.SOCK_DGRAM,)}
        for path in (target.host,) if target.scheme else LOCAL_PATHS:
            # The local daemon's is a datagram socket, or once was a stream.
            for kind in kinds.get(target.scheme, (socket.SOCK_DGRAM, socket.SOCK_STREAM)):
                sock = trio.socket.socket(socket.AF_UNIX, kind)
                try:
                    await sock.connect(path)
                except OSError:
                    sock.close()
                    if target.scheme:
                        raise
                    continue
                except BaseException:
                    sock.close()
                    raise
                return cls(trio.SocketStream(sock), None) if kind == socket.SOCK_STREAM else cls(None, sock)
        raise SystemFailure("Unix syslog delivery error")  # srslog's words

    @property
    def is_stream(self) -> bool:
        return self._stream is not None

    async def send(self, messages: Sequence[bytes]) -> int:
        """Send them; returns how many were refused as datagrams can be (nobody listens).

        Raises: SystemFailure when a stream broke: it is not known which of them arrived.
        """
        if self._stream is not None:
            try:
                await self._stream.send_all(b"".join(messages))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise SystemFailure(f"the syslog server closed the connection: {error.__cause__ or error}") from error
            return 0
        assert self._datagrams is not None
        refused = 0
        for message in messages:
            try:
                await self._datagrams.send(message)
            except ConnectionRefusedError:
                refused += 1
            except OSError as error:
                raise SystemFailure(f"cannot send to syslog: {error.strerror}") from error
        return refused

    async def finish(self) -> None:
        """With TLS's close_notify, as RFC 5425 wants it."""
        if self._stream is not None:
            with trio.move_on_after(FINISH_TIMEOUT_S):
                await self._stream.aclose()

    async def aclose(self) -> None:
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
        self.close()

    def close(self) -> None:
        """At once, without a word."""
        if self._datagrams is not None:
            self._datagrams.close()
        stream = self._stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        if isinstance(stream, trio.SocketStream):
            stream.socket.close()


async def _open_udp(target: Target) -> trio.socket.SocketType:
    found = await trio.socket.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    sock = trio.socket.socket(family, kind, protocol)
    try:
        await sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _context(settings: Settings) -> ssl.SSLContext:
    """Raises: OSError (ssl.SSLError is one) for files that cannot be used."""
    import ssl

    if settings.ca_cert and not Path(settings.ca_cert).is_file():
        raise FileNotFoundError(2, f"could not read CA certificate {settings.ca_cert!r}")
    context = ssl.create_default_context(cafile=settings.ca_cert or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.cert or settings.key:
        context.load_cert_chain(settings.cert, settings.key or None)
    return context


def _words(error: BaseException | None) -> str:
    """The kernel's or OpenSSL's words, wherever Trio has put them."""
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
            continue
        if isinstance(error, ConnectionRefusedError):
            return "connect: connection refused"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if error.__cause__ is None:
            return str(error)
        error = error.__cause__
    return ""


def _shown(target: Target) -> str:
    return f"{target.scheme} {target.host}:{target.port}" if target.port else f"{target.scheme} {target.host}".strip()


