"""The event bus: wire form, replay, filters, listeners that do not keep up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from balenapy.core import gojson
from balenapy.core.container import Container, ContainerConfig
from balenapy.core.filters import Filters
from balenapy.engine.events import KEPT, QUEUED, Event, EventBus, matches
from tests.trio_tests import trio_test

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
SECOND = 10**9


def recorded() -> list[dict[str, Any]]:
    """Events of the reference engine, without those it has and we have not (builder, prune)."""
    lines = (FIXTURES / "events_lifecycle.jsonl").read_text().splitlines()
    lines += (FIXTURES / "events_run_rm.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def event_of(document: dict[str, Any]) -> Event:
    actor = document["Actor"]
    return Event(document["Type"], document["Action"], actor["ID"], actor["Attributes"], document["timeNano"])


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1000 * SECOND

    def __call__(self) -> int:
        self.now_ns += SECOND
        return self.now_ns


def container(**labels: str) -> Container:
    return Container(id="c" * 64, name="web", config=ContainerConfig(image="busybox:1", labels=labels or None))


def test_wire_form_is_the_reference_engines() -> None:
    for document in recorded():
        expected = json.dumps(document, separators=(",", ":"))
        assert gojson.dumps(event_of(document).to_json()).decode() == expected


@trio_test
async def test_container_events_carry_labels_image_and_name() -> None:
    bus = EventBus(Clock())
    async with bus.open() as channel:
        bus.container(container(app="shop"), "die", exitCode="137")
        event = await channel.receive()
    assert event.to_json() == {
        "status": "die",
        "id": "c" * 64,
        "from": "busybox:1",
        "Type": "container",
        "Action": "die",
        "Actor": {
            "ID": "c" * 64,
            "Attributes": {"app": "shop", "exitCode": "137", "image": "busybox:1", "name": "web"},
        },
        "scope": "local",
        "time": 1001,
        "timeNano": 1001 * SECOND,
    }


@trio_test
async def test_other_actors() -> None:
    bus = EventBus(Clock())
    async with bus.open() as channel:
        bus.image("sha256:1", "untag", {"name": "sha256:1"})
        bus.volume("v", "create", {"driver": "local"})
        bus.network("n" * 64, "connect", {"name": "bridge", "type": "bridge", "container": "c"})
        bus.daemon("reload", {"debug": "true"})
        events = [await channel.receive() for _ in range(4)]
    assert [list(event.to_json()) for event in events] == [
        ["status", "id", "Type", "Action", "Actor", "scope", "time", "timeNano"],
        *[["Type", "Action", "Actor", "scope", "time", "timeNano"]] * 3,
    ]
    assert events[3].attributes["name"] == events[3].actor_id


@trio_test
async def test_only_live_events_without_since_and_until() -> None:
    bus = EventBus(Clock())
    bus.volume("old", "create")
    async with bus.open() as channel:
        bus.volume("new", "create")
        assert (await channel.receive()).actor_id == "new"


@trio_test
async def test_since_replays_then_goes_on() -> None:
    bus = EventBus(Clock())
    for name in ("1", "2", "3"):
        bus.volume(name, "create")
    async with bus.open(since_ns=1002 * SECOND) as channel:
        bus.volume("4", "create")
        assert [(await channel.receive()).actor_id for _ in range(3)] == ["2", "3", "4"]


@trio_test
async def test_until_in_the_past_replays_and_ends() -> None:
    bus = EventBus(Clock())
    for name in ("1", "2", "3"):
        bus.volume(name, "create")
    async with bus.open(until_ns=1002 * SECOND) as channel:
        assert [event.actor_id async for event in channel] == ["1", "2"]
    assert bus.listener_count == 0


@trio_test
async def test_the_last_256_are_kept() -> None:
    bus = EventBus(Clock())
    for number in range(KEPT + 10):
        bus.volume(str(number), "create")
    async with bus.open(since_ns=0, until_ns=1) as channel:
        assert [event async for event in channel] == []
    async with bus.open(since_ns=0) as channel:
        events = [channel.receive_nowait() for _ in range(KEPT)]
        assert [events[0].actor_id, events[-1].actor_id] == ["10", str(KEPT + 9)]
        with pytest.raises(trio.WouldBlock):
            channel.receive_nowait()


@trio_test
async def test_a_listener_that_does_not_keep_up_is_cut_off_alone() -> None:
    bus = EventBus(Clock())
    async with bus.open() as slow, bus.open() as quick:
        for number in range(QUEUED + 5):
            bus.volume(str(number), "create")
            await quick.receive()
        assert bus.listener_count == 1
        assert len([event async for event in slow]) == QUEUED
        bus.volume("after", "create")
        assert (await quick.receive()).actor_id == "after"
    assert bus.listener_count == 0


DIE = Event("container", "die", "abcdef", {"name": "web", "image": "repo/app:1.0", "env": "prod"}, 1)
PULL = Event("image", "pull", "repo/app:1.0", {"name": "repo/app", "maintainer": "x"}, 1)
UNTAG = Event("image", "untag", "sha256:feed", {"name": "sha256:feed"}, 1)
CONNECT = Event("network", "connect", "netid", {"name": "bridge", "type": "bridge", "container": "abcdef"}, 1)
EXEC = Event("container", "exec_start: sh -c true", "abcdef", {"name": "web", "image": "busybox"}, 1)


@pytest.mark.parametrize(
    ("event", "filters", "expected"),
    [
        (DIE, {}, True),
        (DIE, {"type": ("container",)}, True),
        (DIE, {"type": ("image", "container")}, True),
        (DIE, {"type": ("image",)}, False),
        (DIE, {"event": ("die",)}, True),
        (DIE, {"event": ("di",)}, False),
        (DIE, {"event": ("start", "die"), "type": ("network",)}, False),
        (DIE, {"container": ("web",)}, True),
        (DIE, {"container": ("abc",)}, True),
        (DIE, {"container": ("we",)}, True),
        (DIE, {"container": ("eb",)}, False),
        (DIE, {"label": ("env",)}, True),
        (DIE, {"label": ("env=prod",)}, True),
        (DIE, {"label": ("env=prod", "other")}, False),
        (DIE, {"label": ("name=web",)}, True),
        (DIE, {"image": ("repo/app:1.0",)}, True),
        (DIE, {"image": ("repo/app",)}, True),
        (DIE, {"image": ("repo/ap",)}, False),
        (DIE, {"scope": ("local",)}, True),
        (DIE, {"scope": ("swarm",)}, False),
        (DIE, {"nonsense": ("x",)}, True),
        (PULL, {"image": ("repo/app",)}, True),
        (UNTAG, {"image": ("sha256:feed",)}, True),
        (CONNECT, {"container": ("abcdef",)}, False),
        (CONNECT, {"network": ("brid",)}, True),
        (CONNECT, {"network": ("netid",)}, True),
        (CONNECT, {"container": ("bridge",)}, True),
        (EXEC, {"event": ("exec_start",)}, True),
        (EXEC, {"event": ("exec_create",)}, False),
        (DIE, {"event": ("exec_start", "di")}, True),
    ],
)
def test_filters(event: Event, filters: dict[str, tuple[str, ...]], expected: bool) -> None:
    assert matches(event, Filters(filters)) is expected
