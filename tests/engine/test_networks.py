"""Networks on the real kernel: what a client of a published port, and the next daemon, find."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import trio

from balenapy.errors import SystemFailure
from balenapy.linux import firewall, links, netns
from tests.engine.network_rig import answering, ask, network_rig
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")]


@trio_test
async def test_a_published_port_answers_from_the_host_on_every_address(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        container = rig.container(publish={"80/tcp": [("", "")]})
        path = await rig.start(container)
        bindings = container.sandbox.ports["80/tcp"]
        assert bindings is not None
        port = int(bindings[0].host_port)
        with answering(path, 80):
            answers = [ask(address, port) for address in ("127.0.0.1", rig.gateway)]

        assert bindings[0].host_ip == "0.0.0.0"
        assert answers == [rig.gateway, rig.gateway]
