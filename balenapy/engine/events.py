"""The event bus: what happened, to whoever listens now, and the last 256 for whoever asks later.

Publishing is synchronous and never waits: a listener has a bounded channel, and one that does not keep up is cut off
(its channel ends), not the engine.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core.filters import NO_FILTERS, Filters
from balenapy.core.reference import parse_reference
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.core.container import Container

log = logging.getLogger(__name__)

KEPT = 256  # moby daemon/events eventsLimit
QUEUED = 1024  # events a listener may be behind
# Given without suffix these match `exec_create: sh` and the like. Source: moby daemon/events/filter.go
PREFIXED_ACTIONS = ("health_status", "exec_create", "exec_start")
# Filters on an object: by id or name, exactly or as a prefix, on events of every type.
OBJECTS = ("daemon", "container", "plugin", "volume", "network", "node", "service", "secret", "config")


@dataclass(frozen=True, slots=True)
class Event:
    type: str  # container, image, volume, network, daemon
    action: str
    actor_id: str
    attributes: Mapping[str, str]
    time_ns: int

    def to_json(self) -> dict[str, Any]:
        """The wire form; containers and images repeat action and actor in the keys of older clients."""
        result: dict[str, Any] = {}
        if self.type in ("container", "image"):
            result = {"status": self.action, "id": self.actor_id}
            if self.type == "container" and self.attributes.get("image"):
                result["from"] = self.attributes["image"]
        result["Type"] = self.type
        result["Action"] = self.action
        result["Actor"] = {"ID": self.actor_id, "Attributes": dict(sorted(self.attributes.items()))}
        result["scope"] = "local"
        result["time"] = self.time_ns // 10**9
        result["timeNano"] = self.time_ns
        return result


class EventBus:
    def __init__(self, now: Callable[[], int] = time.time_ns) -> None:
        self._now = now
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._listeners: dict[trio.MemorySendChannel[Event], Filters] = {}

    @property
    def listener_count(self) -> int:
        return len(self._listeners)

    def publish(self, type: str, action: str, actor_id: str, attributes: Mapping[str, str] | None = None) -> None:
        event = Event(type, action, actor_id, dict(attributes or {}), self._now())
        self._kept.append(event)
        for channel, filters in list(self._listeners.items()):
            if not matches(event, filters):
                continue
            try:
                channel.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                log.warning("event listener does not keep up and is cut off")
                del self._listeners[channel]
                channel.close()

    def container(self, container: Container, action: str, **extra: str) -> None:
        """Attributes are the container's labels, its image as given at create and its name; `extra` adds to them."""
        attributes = dict(container.config.labels or {})
        attributes |= {"image": container.config.image, "name": container.name}
        self.publish("container", action, container.id, attributes | extra)

    def image(self, actor_id: str, action: str, attributes: Mapping[str, str] | None = None) -> None:
        """`actor_id` is the image_id, or the reference for pull and push; attributes hold the labels and `name`."""
        self.publish("image", action, actor_id, attributes)

    def volume(self, name: str, action: str, attributes: Mapping[str, str] | None = None) -> None:
        self.publish("volume", action, name, attributes)

    def network(self, network_id: str, action: str, attributes: Mapping[str, str] | None = None) -> None:
        self.publish("network", action, network_id, attributes)

    def daemon(self, action: str, attributes: Mapping[str, str] | None = None) -> None:
        """The actor is this engine, named for its host."""
        name = socket.gethostname()
        self.publish("daemon", action, name, {"name": name, **(attributes or {})})

    @asynccontextmanager
    async def open(
        self, since_ns: int | None = None, until_ns: int | None = None, filters: Filters = NO_FILTERS
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """Listen: kept events of the time asked for, then live ones. Without `since` and `until` only live ones.

        The channel ends after the kept events when `until` is past. One in the future is the caller's deadline.
        """
        send, receive = trio.open_memory_channel[Event](QUEUED)
        if since_ns is not None or until_ns is not None:
            for event in list(self._kept):
                if event.time_ns < (since_ns or 0) or (until_ns is not None and event.time_ns > until_ns):
                    continue
                if matches(event, filters):
                    send.send_nowait(event)
        if until_ns is not None and until_ns < self._now():
            send.close()
        else:
            self._listeners[send] = filters
        try:
            with receive:
                yield receive
        finally:
            self._listeners.pop(send, None)
            send.close()


def matches(event: Event, filters: Filters) -> bool:
    """Values of one key are alternatives, keys are ANDed. Source: moby daemon/events/filter.go, Include."""
    if not filters:
        return True
    by_action = filters.exact
    if any(action in PREFIXED_ACTIONS for action in filters.get("event")):
        by_action = filters.prefix
    name = event.attributes.get("name", "")
    return (
        by_action("event", event.action)
        and filters.exact("type", event.type)
        and filters.exact("scope", "local")
        and all(filters.prefix(key, event.actor_id) or filters.prefix(key, name) for key in OBJECTS)
        and _matches_image(event, filters)
        and filters.labels(event.attributes)
    )


def _matches_image(event: Event, filters: Filters) -> bool:
    """Find image events, and container events by the image the container was created from."""
    if not filters.get("image"):
        return True
    name = event.attributes.get("name" if event.type == "image" else "image", "")
    candidates = (event.actor_id, name, _name_of(event.actor_id), _name_of(name))
    return any(filters.exact("image", text) for text in candidates)


def _name_of(text: str) -> str:
    try:
        return parse_reference(text).familiar_name()
    except InvalidParameter:
        return text
