"""A few calls of the engine's API over its socket."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

SOCKET = "/run/balena-engine.sock"


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Connection(http.client.HTTPConnection):
    """HTTP over the engine's socket."""

    def __init__(self, timeout: float, path: str = SOCKET) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def call(method: str, path: str, body: Any = None, timeout_s: float = 120.0) -> Any:
    """One request; the JSON of its answer, None if it is empty, text if it is none.

    Raises: ApiError, OSError.
    """
    connection = Connection(timeout_s)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"{path}: {error!r}") from error
    finally:
        connection.close()
    if response.status >= 400:
        try:
            text = json.loads(text)["message"]
        except (ValueError, KeyError, TypeError):
            pass
        raise ApiError(response.status, text)
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
