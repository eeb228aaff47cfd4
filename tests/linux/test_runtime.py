from __future__ import annotations

from pathlib import Path

import pytest

from balenapy.config import Config
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.linux import runtime
from balenapy.linux.cgroups import Cgroups, Hierarchy, Mode
from balenapy.linux.runtime import Runtimes, choose, familiar_message, start_failure

CREATE = "runc create failed: unable to start container process: "


@pytest.mark.parametrize(
    ("message", "command", "code", "kind"),
    [
        (CREATE + 'exec: "nosuch": executable file not found in $PATH', "nosuch", 127, InvalidParameter),
        (CREATE + 'exec: "/no/such": stat /no/such: no such file or directory', "/no/such", 127, InvalidParameter),
        (CREATE + 'exec: "/etc/passwd": permission denied', "/etc/passwd", 126, InvalidParameter),
        (CREATE + "mounting proc: permission denied", "sh", 126, InvalidParameter),
        (CREATE + 'error mounting "/x": not a directory', "sh", 127, InvalidParameter),
        (CREATE + "open /dev/zz: no such file or directory", "sleep", 0, SystemFailure),
        ("sysctl kernel.zz is not in a separate kernel namespace", "sh", 0, SystemFailure),
    ],
)
def test_words_of_the_runtime_have_a_code_and_a_kind(
    message: str, command: str, code: int, kind: type[Exception]
) -> None:
    failure = start_failure(message, command)

    assert failure.exit_code == code
    assert type(failure.error) is kind
    assert failure.error.message.startswith(f"OCI runtime create failed: {message}: unknown")


def test_a_directory_over_a_file_is_explained() -> None:
    text = start_failure("x: not a directory", "sh").error.message
    assert text.endswith(
        ": Are you trying to mount a directory onto a file (or vice-versa)? "
        "Check if the specified host path exists and is the expected type"
    )


def test_a_failed_exec_says_exec() -> None:
    assert start_failure("x", "sh", verb="exec").error.message == "OCI runtime exec failed: x: unknown"


def test_crun_speaks_as_runc_does() -> None:
    words = "executable file `nosuch` not found in $PATH: No such file or directory"
    assert familiar_message(words) == 'exec: "nosuch": executable file not found in $PATH'
    assert familiar_message("open executable: Permission denied") == "open executable: permission denied"


def _cgroups(mode: Mode, *bound: str) -> Cgroups:
    return Cgroups(mode, (Hierarchy(Path("/sys/fs/cgroup/unified"), 2, frozenset(bound)),))


@pytest.mark.parametrize(
    ("installed", "cgroups", "chosen"),
    [
        ({"crun", "runc"}, _cgroups(Mode.UNIFIED, "memory"), "crun"),
        ({"crun", "runc"}, _cgroups(Mode.LEGACY), "crun"),
        ({"crun", "runc"}, _cgroups(Mode.HYBRID), "crun"),
        ({"crun", "runc"}, _cgroups(Mode.HYBRID, "hugetlb"), "runc"),
        ({"runc"}, _cgroups(Mode.UNIFIED), "runc"),
        ({"balena-engine-runc"}, _cgroups(Mode.UNIFIED), "balena-engine-runc"),
    ],
)
def test_the_runtime_that_this_machine_allows_is_chosen(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], cgroups: Cgroups, chosen: str
) -> None:
    monkeypatch.setattr(runtime, "_find", lambda name: f"/bin/{name}" if name in installed else None)
    assert choose(cgroups) == f"/bin/{chosen}"


def test_without_a_runtime_that_works_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_find", lambda name: "/bin/crun" if name == "crun" else None)
    with pytest.raises(SystemFailure, match="no OCI runtime: install runc"):
        choose(_cgroups(Mode.HYBRID, "hugetlb"))


def test_runtimes_have_names(tmp_path: Path) -> None:
    runtimes = Runtimes(Config(exec_root=tmp_path, runtimes={"mine": "/usr/sbin/runc"}))

    assert set(runtimes.paths) == {"runc", "mine"}
    assert runtimes.get("").name == runtimes.get("bare").name == "runc"
    assert runtimes.get("mine").root == tmp_path / "runtimes" / "mine"
    with pytest.raises(InvalidParameter, match="Unknown runtime specified zz"):
        runtimes.get("zz")
    with pytest.raises(SystemFailure, match="runtime zz: /no/such is not an executable"):
        Runtimes(Config(exec_root=tmp_path, runtimes={"zz": "/no/such"}))
