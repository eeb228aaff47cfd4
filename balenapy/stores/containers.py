"""Rows of containers. The dictionary in memory is what is read; records are changed in place and then made durable.

Two rows a container: `container` holds what create and update set, `container_state` what every start and exit
change (state, endpoints, sandbox), so that a start writes little.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from typing import Any

from balenapy.core import wire
from balenapy.core.container import Container, EndpointSettings, SandboxState, State, Status
from balenapy.errors import EngineError
from balenapy.linux import durable
from balenapy.stores.db import Database

log = logging.getLogger(__name__)


class ContainerStore:
    def __init__(self, db: Database) -> None:
        """Load the rows. Blocks: for start. A row that cannot be read is logged, left alone and not listed."""
        self._db = db
        self._containers: dict[str, Container] = {}
        rows = db.query(
            "SELECT container.id, record, state FROM container "
            "LEFT JOIN container_state ON container_state.id = container.id"
        )
        for container_id, record, state in rows:
            try:
                container = decode_record(str(record), str(state or "{}"))
                if container.id != container_id:
                    raise ValueError("its record is another's")
            except (EngineError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                db.found_damaged("container", container_id, error)
                self._free_name(str(container_id))
                continue
            self._containers[container.id] = container

    def _free_name(self, container_id: str) -> None:
        """The row stays, but somebody may make the container again under its name."""

        def rename(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE container SET name = id || '.corrupt' WHERE id = ?", (container_id,))

        try:
            self._db.transaction_nowait(rename)
        except EngineError as error:
            log.error("cannot free the name of a damaged container id=%s error=%s", container_id, error.message)

    def all(self) -> list[Container]:
        return list(self._containers.values())

    def find(self, container_id: str) -> Container | None:
        return self._containers.get(container_id)

    def write(self, connection: sqlite3.Connection, container: Container) -> None:
        """The rows of a new container, inside somebody's transaction; `adopt` follows when it is committed."""
        durable.step("insert container")
        connection.execute(
            "INSERT INTO container(id, name, record) VALUES (?, ?, ?)",
            (container.id, container.name, encode_record(container)),
        )
        connection.execute(
            "INSERT INTO container_state(id, state) VALUES (?, ?)", (container.id, encode_state(container))
        )

    def adopt(self, container: Container) -> None:
        self._containers[container.id] = container

    async def insert(self, container: Container) -> None:
        await self._db.change(lambda connection: self.write(connection, container), lambda _: self.adopt(container))

    async def update_record(self, container: Container) -> None:
        """Make what create set durable again, after a change in place. Cancellation: not written, or written."""
        name, record = container.name, encode_record(container)

        def update(connection: sqlite3.Connection) -> None:
            durable.step("update container")
            connection.execute("UPDATE container SET name = ?, record = ? WHERE id = ?", (name, record, container.id))

        await self._db.transaction(update)

    async def update_state(self, container: Container) -> None:
        """Make state, endpoints and sandbox durable as they are now. Cancellation: not written, or written."""
        state = encode_state(container)

        def update(connection: sqlite3.Connection) -> None:
            durable.step("update container state")
            connection.execute("UPDATE container_state SET state = ? WHERE id = ?", (state, container.id))

        await self._db.transaction(update, volatile=True)

    def erase(self, connection: sqlite3.Connection, container_id: str) -> None:
        """Delete the rows, inside somebody's transaction; `forget` follows when it is committed."""
        durable.step("delete container")
        connection.execute("DELETE FROM container WHERE id = ?", (container_id,))
        connection.execute("DELETE FROM container_state WHERE id = ?", (container_id,))

    def forget(self, container_id: str) -> None:
        self._containers.pop(container_id, None)

    async def delete(self, container_id: str) -> None:
        """Again is fine."""
        await self._db.change(
            lambda connection: self.erase(connection, container_id), lambda _: self.forget(container_id)
        )


def encode_record(container: Container) -> str:
    return json.dumps(wire.encode(container), separators=(",", ":"))


def encode_state(container: Container) -> str:
    document: dict[str, Any] = {
        "Status": container.state.status.value,
        "State": wire.encode(container.state),
        "Endpoints": {name: wire.encode(endpoint) for name, endpoint in container.endpoints.items()},
        "Sandbox": wire.encode(container.sandbox),
    }
    return json.dumps(document, separators=(",", ":"))


def decode_record(record: str, state: str) -> Container:
    """Raises: MalformedJSON, ValueError."""
    container = wire.decode(Container, json.loads(record))
    document = json.loads(state)
    container.state = wire.decode(State, document.get("State"))
    container.state.status = Status(document.get("Status", Status.CREATED.value))
    endpoints = document.get("Endpoints") or {}
    container.endpoints = {name: wire.decode(EndpointSettings, value) for name, value in endpoints.items()}
    container.sandbox = wire.decode(SandboxState, document.get("Sandbox"))
    return container
