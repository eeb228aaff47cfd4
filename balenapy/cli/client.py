"""A blocking HTTP/1.1 client of the engine's socket: requests, streamed answers, raw (hijacked) streams.

h11 does the protocol, so a stream that stops being HTTP is simply the socket plus the bytes h11 has read too far.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import h11

DEFAULT_HOST = "unix:///var/run/balena-engine.sock"
READ_SIZE = 64 * 1024


class ClientError(Exception):
    """What the command line prints before it exits with a failure."""

    exit_code = 0  # of the process; 0: the usual one


class NoEngine(ClientError):
    """Nobody answers at that socket."""


class EngineAnswer(ClientError):
    """The engine answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"Error response from daemon: {message}")
        self.status = status
        self.message = message


class Response:
    """One answer: status, headers and a body that is read once, whole or in pieces."""

    def __init__(
        self, connection: socket.socket, protocol: h11.Connection, head: h11.Response | h11.InformationalResponse
    ) -> None:
        self._socket = connection
        self._protocol = protocol
        self.status = head.status_code
        self.headers = {name.decode().lower(): value.decode() for name, value in head.headers}

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives."""
        while True:
            event = _next_event(self._socket, self._protocol)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                self.close()
                return

    def objects(self) -> Iterator[dict[str, Any]]:
        """The body as a sequence of JSON objects, however they are cut and separated."""
        decoder = json.JSONDecoder()
        text = b""
        for chunk in self.chunks():
            text += chunk
            *lines, text = text.split(b"\n")
            for line in lines:
                rest = line.decode().strip()
                while rest:
                    found, end = decoder.raw_decode(rest)
                    yield found
                    rest = rest[end:].lstrip()
        if text.strip():
            yield json.loads(text)

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> Any:
        body = self.read()
        return json.loads(body) if body.strip() else None

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For `select`: readable when more of the body, or its end, is there."""
        return self._socket.fileno()

    def detach(self) -> tuple[socket.socket, bytes]:
        """The connection as a raw stream: the socket, and bytes that arrived with the head."""
        return self._socket, self._protocol.trailing_data[0]


class Client:
    """Talks to one engine. Each request has a connection of its own, so that streams never wait for each other."""

    def __init__(self, host: str | None = None) -> None:
        self.host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST

    def _connect(self) -> socket.socket:
        scheme, _, rest = self.host.partition("://")
        try:
            if scheme == "unix":
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.connect(rest)
                except OSError:
                    connection.close()
                    raise
                return connection
            if scheme == "tcp":
                name, _, port = rest.rpartition(":")
                plain = socket.create_connection((name.strip("[]"), int(port)))
                if os.environ.get("DOCKER_TLS_VERIFY") or os.environ.get("DOCKER_TLS"):
                    return self._secure(plain, name)
                return plain
        except (OSError, ValueError) as error:
            raise NoEngine(
                f"Cannot connect to the engine at {self.host}: {error}. Is balenapyd running?"
            ) from error
        raise ClientError(f"unable to parse host {self.host!r}: unix://PATH or tcp://HOST:PORT")

    def _secure(self, plain: socket.socket, name: str) -> socket.socket:
        import ssl

        where = os.environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")
        context = ssl.create_default_context(cafile=os.path.join(where, "ca.pem"))
        context.load_cert_chain(os.path.join(where, "cert.pem"), os.path.join(where, "key.pem"))
        if not os.environ.get("DOCKER_TLS_VERIFY"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(plain, server_hostname=name.strip("[]"))

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: object,
        headers: Mapping[str, str] | None,
        upgrade: bool,
    ) -> Response:
        target = quote(path, safe="/:@%")
        if query:
            target += "?" + urlencode({key: _parameter(value) for key, value in query.items()}, doseq=True)
        fields = {"Host": "docker", "User-Agent": "balenapy", **(headers or {})}
        data = b""
        if body is not None:
            data = json.dumps(body).encode()
            fields["Content-Type"] = "application/json"
        if data or method in ("POST", "PUT"):
            fields["Content-Length"] = str(len(data))
        fields |= {"Connection": "Upgrade", "Upgrade": "tcp"} if upgrade else {"Connection": "close"}
        protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        connection = self._connect()
        out = protocol.send(h11.Request(method=method, target=target, headers=list(fields.items())))
        out += protocol.send(h11.Data(data=data)) + protocol.send(h11.EndOfMessage())
        try:
            connection.sendall(out)
            while True:
                event = _next_event(connection, protocol)
                if isinstance(event, h11.Response) or (
                    isinstance(event, h11.InformationalResponse) and event.status_code == 101
                ):
                    return Response(connection, protocol, event)
                if isinstance(event, h11.ConnectionClosed):
                    raise ClientError("the engine closed the connection without an answer")
        except (OSError, h11.RemoteProtocolError) as error:
            connection.close()
            raise ClientError(f"error during connect: {error}") from error

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request; the answer's body is still to be read.

        Raises: EngineAnswer for a status of 400 and above, ClientError when there is no engine.
        """
        response = self._send(method, path, query, body, headers, upgrade=False)
        if response.status >= 400:
            raise EngineAnswer(response.status, _message(response))
        return response

    def upload(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        write: Callable[[Callable[[bytes], None]], None],
        content_type: str = "application/x-tar",
    ) -> Response:
        """Send a request whose body `write` makes, piece by piece.

        Raises: as `request`; an answer that comes before the body is over counts.
        """
        target = quote(path, safe="/:@%") + "?" + urlencode({key: _parameter(value) for key, value in query.items()})
        fields = {"Host": "docker", "User-Agent": "balenapy", "Content-Type": content_type, "Connection": "close"}
        fields["Transfer-Encoding"] = "chunked"
        protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        connection = self._connect()
        try:
            connection.sendall(protocol.send(h11.Request(method=method, target=target, headers=list(fields.items()))))

            def put(data: bytes) -> None:
                connection.sendall(protocol.send(h11.Data(data=data)))

            try:
                write(put)
                connection.sendall(protocol.send(h11.EndOfMessage()))
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has answered already
            event = _next_event(connection, protocol)
            while isinstance(event, h11.InformationalResponse):
                event = _next_event(connection, protocol)
        except (OSError, h11.RemoteProtocolError) as error:
            connection.close()
            raise ClientError(f"error during connect: {error}") from error
        if not isinstance(event, h11.Response):
            raise ClientError("the engine closed the connection without an answer")
        response = Response(connection, protocol, event)
        if response.status >= 400:
            raise EngineAnswer(response.status, _message(response))
        response.read()
        return response

    def call(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: object = None
    ) -> Any:
        """`request`, with the whole answer as JSON (None when it is empty)."""
        return self.request(method, path, query, body).json()

    def hijack(
        self, path: str, query: Mapping[str, Any] | None = None, body: object = None
    ) -> tuple[socket.socket, bytes]:
        """POST that turns into a raw stream: the socket, and bytes that came along with the head."""
        response = self._send("POST", path, query, body, None, upgrade=True)
        if response.status not in (101, 200):
            raise EngineAnswer(response.status, _message(response))
        return response.detach()


def _parameter(value: Any) -> Any:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, dict):
        return json.dumps(value)
    return value


def _message(response: Response) -> str:
    body = response.read().decode(errors="replace").strip()
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body or f"status {response.status}"


def _next_event(connection: socket.socket, protocol: h11.Connection) -> Any:
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(connection.recv(READ_SIZE))
            continue
        return event
