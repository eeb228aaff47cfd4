"""Another machine, as far as a network can tell: a namespace at the other end of a cable to this host."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from balenapy.core.netplan import Setting, Step
from balenapy.linux import netns
from tests.leftovers import claim

IPV6 = Path("/proc/sys/net/ipv6")


@dataclass(frozen=True, slots=True)
class OtherMachine:
    """`path` is its namespace, `address` its own, `host` this host's on the cable; `…6` the same for IPv6."""

    path: str
    address: str
    host: str
    address6: str
    host6: str


@contextlib.contextmanager
def other_machine(directory: Path, number: int) -> Iterator[OtherMachine]:
    """A machine whose default route is this host; gone after the block.

    Args:
        number: 0 to 255, of whoever asks: names the link and the addresses.
    """
    path, link = directory / "machine", f"bptm{number}"
    machine = OtherMachine(
        str(path), f"10.214.{number}.2", f"10.214.{number}.1", f"fd43:{number}::2", f"fd43:{number}::1"
    )
    claim(link)
    claim(str(directory))
    steps: list[Step] = [
        f"link add name out0 type veth peer name {link} netns {netns.home_handle()}\n"
        f"address add {machine.address}/24 dev out0\nlink set dev out0 up\nroute add default via {machine.host}\n"
    ]
    if IPV6.exists():
        steps += [Setting(f"ipv6/conf/{name}/disable_ipv6", "0") for name in ("lo", "out0")]
        steps.append(f"address add {machine.address6}/64 nodad dev out0\nroute add default via {machine.host6}\n")
    # Not in this thread: whoever enters a namespace may be unable to return.
    thread = threading.Thread(target=netns.create, args=(path, steps))
    thread.start()
    thread.join()
    try:
        addresses = [f"{machine.host}/24"] + ([f"{machine.host6}/64"] if IPV6.exists() else [])
        for address in addresses:
            subprocess.run(["ip", "address", "add", address, "dev", link, *["nodad"] * (":" in address)], check=True)
        subprocess.run(["ip", "link", "set", "dev", link, "up"], check=True)
        yield machine
    finally:
        subprocess.run(["ip", "link", "delete", "dev", link], check=False, capture_output=True)
        netns.remove(path)
