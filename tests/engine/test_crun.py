"""The other runtime. On a hybrid machine, which crun refuses, it is shown the legacy hierarchies only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from balenapy.errors import InvalidParameter
from balenapy.linux.cgroups import Cgroups, Mode
from tests.engine.process_rig import frames, open_rig
from tests.trio_tests import trio_test

CRUN = shutil.which("crun")
pytestmark = [pytest.mark.root, pytest.mark.skipif(CRUN is None, reason="no crun on this machine")]

LEGACY_VIEW = """\
#!/bin/sh
exec unshare -m --propagation slave sh -c 'umount /sys/fs/cgroup/unified && exec {crun} "$@"' crun "$@"
"""


@pytest.fixture
def crun(tmp_path: Path) -> str:
    if Cgroups.read().mode is not Mode.HYBRID:
        return str(CRUN)
    script = tmp_path / "crun"
    script.write_text(LEGACY_VIEW.format(crun=CRUN))
    script.chmod(0o755)
    return str(script)


@trio_test
async def test_a_life_under_crun(tmp_path: Path, crun: str) -> None:
    body = {"HostConfig": {"Runtime": "other", "Memory": 50 << 20}}
    async with open_rig(tmp_path, runtimes={"other": crun}) as rig:
        container = await rig.run("sh", "-c", "echo hello; exec sleep 1000", **body)
        exec_id, output = await rig.exec(container, "sh", "-c", "cat; exit 4", stdin=b"x", attach_stdin=True)
        assert frames(output) == {1: b"x"}
        assert rig.execs.inspect(exec_id)["ExitCode"] == 4
        _, output = await rig.exec(container, "tty", tty=True)
        assert output == b"/dev/pts/0\r\n"
        _, output = await rig.exec(container, "nosuch")
        assert b'OCI runtime exec failed: exec: "nosuch": executable file not found in $PATH: unknown\r\n' in output
        await rig.supervisors.pause(container)
        await rig.supervisors.unpause(container)

        # What the failed exec left must not keep the container from ending.
        with trio.fail_after(8):
            await rig.supervisors.kill(container)
        await rig.settled(container)
        assert container.state.exit_code == 137
        assert frames(await rig.output(container)) == {1: b"hello\n"}
        assert rig.leftovers() == {}


@pytest.mark.parametrize(("command", "code"), [("nosuch", 127), ("/etc/passwd", 126)])
@trio_test
async def test_a_command_that_cannot_run_under_crun(tmp_path: Path, crun: str, command: str, code: int) -> None:
    async with open_rig(tmp_path, runtimes={"other": crun}) as rig:
        container = await rig.create(command, HostConfig={"Runtime": "other"})
        with pytest.raises(InvalidParameter):
            await rig.supervisors.start(container)

        assert container.state.exit_code == code
        assert rig.leftovers() == {}
