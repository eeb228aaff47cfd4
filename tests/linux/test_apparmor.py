"""The default AppArmor profile is loaded where it can be. The kernel's part is played: this machine may have none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from balenapy.linux import apparmor


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ENABLED", "LOADED", "POLICIES"):
        monkeypatch.setattr(apparmor, name, tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return tmp_path


def parser(directory: Path, script: str) -> str:
    program = directory / "bin" / "apparmor_parser_played"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program.name


@pytest.mark.parametrize(("text", "enabled"), [("Y\n", True), ("N\n", False), (None, False)])
def test_the_kernel_says_whether_it_has_it(kernel: Path, text: str | None, enabled: bool) -> None:
    if text is not None:
        (kernel / "ENABLED").write_text(text)

    assert apparmor.is_enabled() is enabled


def test_a_profile_that_is_loaded_stays(kernel: Path) -> None:
    (kernel / "LOADED").write_text("snap.x (enforce)\ndocker-default (enforce)\n")

    assert apparmor.ensure_default_profile(parser(kernel, "exit 1"))


def test_a_profile_that_is_missing_is_loaded(kernel: Path) -> None:
    (kernel / "LOADED").write_text("docker-default-other (enforce)\n")

    assert apparmor.ensure_default_profile(parser(kernel, f'echo "$@" > {kernel}/arguments; cat > {kernel}/profile'))

    assert (kernel / "arguments").read_text() == "-Kr\n"
    profile = (kernel / "profile").read_text()
    assert profile == apparmor.profile_text()
    assert "profile docker-default flags=(attach_disconnected,mediate_deleted) {" in profile
    assert "deny @{PROC}/sysrq-trigger rwklx," in profile
    assert profile.startswith("@{PROC}=/proc/\n")
    assert profile.count("{") == profile.count("}")


def test_the_machines_own_policies_are_used(kernel: Path) -> None:
    for name in ("tunables/global", "abstractions/base"):
        (kernel / "POLICIES" / name).parent.mkdir(parents=True)
        (kernel / "POLICIES" / name).touch()

    assert apparmor.profile_text().startswith("#include <tunables/global>\n")
    assert "#include <abstractions/base>" in apparmor.profile_text()


@pytest.mark.parametrize("script", ["exit 1", "echo syntax error >&2; exit 2"])
def test_what_cannot_be_loaded_is_not_used(kernel: Path, script: str) -> None:
    assert not apparmor.ensure_default_profile(parser(kernel, script))


def test_without_a_parser_it_is_not_used(kernel: Path) -> None:
    assert not apparmor.ensure_default_profile("apparmor_parser_nobody_has")
