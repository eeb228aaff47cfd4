"""Another host reaches what is published and nothing else; no packet is lost when the engine or its rules come anew."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from balenapy.cli.main import main
from balenapy.core.netplan import table_name
from balenapy.linux import netns
from tests.engine.network_rig import answering, ask
from tests.engine_process import EngineProcess, leftovers, running_engine, wait_until
from tests.leftovers import Leftovers, claim, wait_for_no_leftovers
from tests.other_machine import IPV6, OtherMachine, other_machine

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.environ.get("ENGINE_UNDER_TEST") == "dockerd", reason="runs without its firewall rules here"),
]

TIMEOUT_S = 20.0  # a packet that takes so long on a loaded machine is lost


@pytest.fixture(scope="module")
def engine(
    nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, busybox: str
) -> Iterator[EngineProcess]:
    before = leftovers()
    with running_engine(tmp_path_factory.mktemp("hosts")) as engine:
        engine.docker("pull", "-q", busybox)
        yield engine
    added = wait_for_no_leftovers(before)
    assert added == {}


@pytest.fixture(scope="module")
def machine(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherMachine]:
    with other_machine(tmp_path_factory.mktemp("machine"), engine.number) as machine:
        yield machine


@pytest.fixture(autouse=True)
def no_containers(engine: EngineProcess) -> Iterator[None]:
    yield
    if not engine.is_alive:
        engine.start()
    engine.remove_containers()
    for network in engine.request("GET", '/networks?filters={"type":["custom"]}').json:
        assert engine.request("DELETE", f"/networks/{network['Id']}").status == 204


def network(engine: EngineProcess, name: str, part: int, **more: object) -> None:
    """A user-defined network with IPv6 where the kernel has it."""
    bridge = f"bpth{engine.number}-{part}"
    claim(bridge)
    entries = [{"Subnet": f"10.215.{engine.number}.{part * 64}/26"}]
    if IPV6.exists():
        entries.append({"Subnet": f"fd42:{engine.number}:{part}::/64"})
    body = {
        "Name": name,
        "EnableIPv6": IPV6.exists(),
        "IPAM": {"Config": entries},
        "Options": {"com.docker.network.bridge.name": bridge},
    }
    answer = engine.request("POST", "/v1.39/networks/create", body | more)
    assert answer.status == 201, answer.body


def run(engine: EngineProcess, image: str, name: str, *flags: str) -> str:
    """A container that waits; the path of its namespace, in which tests play its processes."""
    engine.docker("run", "-d", "--init", "--name", name, *flags, image, "sleep", "1000")
    return str(engine.inspect(name)["NetworkSettings"]["SandboxKey"])


def port_of(engine: EngineProcess, name: str, port: str) -> int:
    return int(engine.inspect(name)["NetworkSettings"]["Ports"][port][0]["HostPort"])


# -- who reaches whom --


def test_published_ports_are_reached_from_another_host(
    engine: EngineProcess, machine: OtherMachine, busybox: str
) -> None:
    network(engine, "open", 1)
    path = run(engine, busybox, "web", "--network", "open", "-p", "80", "-p", "81/udp", "-p", "127.0.0.1::82")
    udp = port_of(engine, "web", "81/udp")
    with contextlib.ExitStack() as stack:
        for port, kind in ((80, socket.SOCK_STREAM), (81, socket.SOCK_DGRAM), (82, socket.SOCK_STREAM)):
            stack.enter_context(answering(path, port, kind, "::" if IPV6.exists() else "0.0.0.0"))
        tcp = port_of(engine, "web", "80/tcp")
        answers = [
            ask(machine.host, tcp, inside=machine.path),
            ask(machine.host, udp, inside=machine.path, kind=socket.SOCK_DGRAM),
        ]
        if IPV6.exists():
            answers.append(ask(machine.host6, tcp, inside=machine.path))
            answers.append(ask(machine.host6, udp, inside=machine.path, kind=socket.SOCK_DGRAM))
        private = ask(machine.host, port_of(engine, "web", "82/tcp"), inside=machine.path)
        settings = engine.inspect("web")["NetworkSettings"]["Networks"]["open"]
        direct = [
            ask(address, 80, inside=machine.path, timeout_s=0.5)
            for address in (settings["IPAddress"], settings["GlobalIPv6Address"])
            if address
        ]

    assert {answer.removeprefix("::ffff:") for answer in answers} == {machine.address} | (
        {machine.address6} if IPV6.exists() else set()
    )
    assert private == "ConnectionRefusedError"
    # The container's own address and port are known to nobody outside. (A published port may be asked either way.)
    assert set(direct) <= {"TimeoutError"}


def test_internal_networks_are_reached_from_no_other_host_and_reach_none(
    engine: EngineProcess, machine: OtherMachine, busybox: str
) -> None:
    network(engine, "inner", 1, Internal=True)
    path = run(engine, busybox, "web", "--network", "inner", "-p", "80")
    settings = engine.inspect("web")["NetworkSettings"]
    addresses = [settings["Networks"]["inner"][key] for key in ("IPAddress", "GlobalIPv6Address")]
    with answering(path, 80, address="::" if IPV6.exists() else "0.0.0.0"), answering(machine.path, 90):
        inward = [ask(address, 80, inside=machine.path, timeout_s=0.5) for address in addresses if address]
        outward = ask(machine.address, 90, inside=path, timeout_s=0.5)
        # With a route by hand there still is the firewall.
        run_in(path, "ip", "route", "add", "default", "via", f"10.215.{engine.number}.65")
        with_route = ask(machine.address, 90, inside=path, timeout_s=0.5)
        from_host = ask(addresses[0], 80)

    assert settings["Ports"] in ({}, {"80/tcp": None})
    assert set(inward) == {"TimeoutError"}
    assert (outward, with_route) == ("OSError", "TimeoutError")
    assert from_host.endswith(f"10.215.{engine.number}.65")


def test_bridges_are_isolated_from_each_other(engine: EngineProcess, busybox: str) -> None:
    network(engine, "first", 1)
    network(engine, "second", 2)
    one, two = (run(engine, busybox, name, "--network", name) for name in ("first", "second"))
    default = run(engine, busybox, "third")
    address = engine.inspect("second")["NetworkSettings"]["Networks"]["second"]["IPAddress"]
    with answering(two, 80):
        before = [ask(address, 80, inside=path, timeout_s=0.5) for path in (one, default)]
        engine.docker("network", "connect", "second", "first")
        after = ask(address, 80, inside=one)
        engine.docker("network", "disconnect", "second", "first")
        again = ask(address, 80, inside=one, timeout_s=0.5)

    assert before == ["TimeoutError", "TimeoutError"]
    assert after == f"10.215.{engine.number}.131"
    assert again == "TimeoutError"


def run_in(path: str, *command: str) -> None:
    subprocess.run(["nsenter", f"--net={path}", *command], check=True, capture_output=True)


def test_sctp_is_redirected_to_the_container(engine: EngineProcess, machine: OtherMachine, busybox: str) -> None:
    """The kernel here may have no SCTP of its own: an INIT chunk made by hand does not need it."""
    path = run(engine, busybox, "phone", "-p", "5060:38412/sctp")
    assert port_of(engine, "phone", "38412/sctp") == 5060
    arrived = netns.open_socket(Path(path), socket.AF_INET, socket.SOCK_RAW, ("0.0.0.0", 0), socket.IPPROTO_SCTP)
    with arrived:
        arrived.setblocking(True)
        arrived.settimeout(TIMEOUT_S)

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP) as sender:
                sender.sendto(sctp_init(40000, 5060), (machine.host, 0))

        netns.call_inside(Path(machine.path), send)
        packet = arrived.recv(2000)

    source, destination = struct.unpack_from("!HH", packet[20:])
    assert socket.inet_ntoa(packet[12:16]) == machine.address
    assert (source, destination) == (40000, 38412)


def sctp_init(source: int, destination: int) -> bytes:
    """RFC 9260 3.3.2, with its checksum: the connection table looks at it."""
    init = struct.pack("!BBHIIHHI", 1, 0, 20, 0x01020304, 65535, 1, 1, 7)
    head = struct.pack("!HHI", source, destination, 0)
    return head + struct.pack("<I", crc32c(head + b"\0" * 4 + init)) + init


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


# -- nothing is lost --


@dataclass
class Pings:
    """What came back of datagrams to a published port: half of them from a socket that stays, half from new ones."""

    machine: OtherMachine
    port: int
    sent: int = 0
    lost: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        netns.call_inside(Path(self.machine.path), self._ping)

    def _ping(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
            for number in itertools.count():
                if self._done.wait(0.0005):
                    return
                if number % 2:
                    self._one(old, "an old flow")
                else:
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as new:
                        self._one(new, "a new flow")

    def _one(self, client: socket.socket, what: str) -> None:
        client.settimeout(TIMEOUT_S)
        begun = time.monotonic()
        self.sent += 1
        try:
            client.connect((self.machine.host, self.port))
            client.send(b"?")
            client.recv(100)
        except OSError as error:
            self.lost.append(f"{what}: {error}")
        self.longest_s = max(self.longest_s, time.monotonic() - begun)


@contextlib.contextmanager
def pinging(engine: EngineProcess, machine: OtherMachine, image: str) -> Iterator[Pings]:
    """From the other host to a container, one after the other."""
    path = run(engine, image, "echo", "-p", "7/udp")
    pings = Pings(machine, port_of(engine, "echo", "7/udp"))
    with answering(path, 7, socket.SOCK_DGRAM):
        thread = threading.Thread(target=pings.run)
        thread.start()
        try:
            wait_until(lambda: pings.sent > 50 or pings.lost, timeout_s=60, what="the first answers")
            yield pings
        finally:
            pings._done.set()
            thread.join()


def tell(what: str, pings: Pings) -> None:
    print(f"{what}: {pings.sent} datagrams, {len(pings.lost)} lost, {pings.longest_s * 1000:.0f} ms at most")


def test_no_packet_is_lost_while_the_engine_starts_again(
    engine: EngineProcess, machine: OtherMachine, busybox: str
) -> None:
    with pinging(engine, machine, busybox) as pings:
        engine.restart()
        engine.kill()
        engine.start()
    tell("a restart and a crash of the engine", pings)

    assert pings.lost == []


def test_no_packet_is_lost_while_rules_are_written_anew(
    engine: EngineProcess, machine: OtherMachine, busybox: str
) -> None:
    with pinging(engine, machine, busybox) as pings:
        for number in range(5):
            engine.docker("run", "-d", "--name", f"other{number}", "-p", "80", busybox, "sleep", "1000")
            assert engine.request("POST", "/firewall/restore").status == 200
            engine.docker("rm", "-f", f"other{number}")
    tell("15 times new rules", pings)

    assert pings.lost == []


# -- rules come back, and go --


def rules_of(engine: EngineProcess) -> str:
    shown = ["nft", "list", "table", "ip", table_name(engine.bridge)]
    return subprocess.run(shown, capture_output=True, text=True, check=False).stdout


def test_rules_that_somebody_flushes_are_there_again(
    engine: EngineProcess, machine: OtherMachine, busybox: str
) -> None:
    path = run(engine, busybox, "web", "-p", "80")
    port, rules, table = port_of(engine, "web", "80/tcp"), rules_of(engine), table_name(engine.bridge)
    assert "dnat to" in rules
    took = []
    with answering(path, 80):
        for command in ("flush table", "delete table"):
            begun = time.monotonic()
            subprocess.run(["nft", *command.split(), "ip", table], check=True)
            wait_until(lambda: rules_of(engine) == rules, timeout_s=30, what=f"rules are back after {command}")
            took.append(time.monotonic() - begun)
            answer = ask(machine.host, port, inside=machine.path)
            assert answer == machine.address
    print(f"rules were back after {max(took) * 1000:.0f} ms at most")

    assert engine.log_text().count("somebody flushed firewall rules") >= 2


def test_rules_vanish_on_request_and_come_back(
    engine: EngineProcess, machine: OtherMachine, busybox: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(engine, busybox, "web", "-p", "80")
    port, host, table = port_of(engine, "web", "80/tcp"), f"unix://{engine.socket}", table_name(engine.bridge)
    with answering(path, 80):
        assert main(["-H", host, "firewall", "clear"]) == 0
        told = capsys.readouterr().out.split()
        run(engine, busybox, "late", "-p", "81")
        cleared, refused = rules_of(engine), ask(machine.host, port, inside=machine.path)
        assert main(["-H", host, "firewall", "restore"]) == 0
        restored = ask(machine.host, port, inside=machine.path)
        both = rules_of(engine).count("dnat to")

        engine.kill()
        without = main(["-H", host, "firewall", "clear", engine.bridge])
        gone = rules_of(engine)
        engine.start()
        started = ask(machine.host, port, inside=machine.path)

    assert table in told
    assert (cleared, refused) == ("", "ConnectionRefusedError")
    assert (restored, both) == (machine.address, 2)
    assert (without, gone) == (0, "")
    assert started == machine.address


def test_a_removed_container_leaves_no_rule(engine: EngineProcess, busybox: str) -> None:
    before = rules_of(engine)
    for kind in ("tcp", "udp"):
        run(engine, busybox, kind, "-p", f"8000-8003/{kind}", "-p", f"127.0.0.1::90/{kind}")
    during = rules_of(engine)
    engine.docker("rm", "-f", "tcp", "udp")

    assert during.count("dnat to") == 10
    assert rules_of(engine) == before
