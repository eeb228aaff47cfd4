"""Flags and daemon.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from balenapy import config
from balenapy.config import DEFAULT_HOSTS, Config, Ulimit, UsageError


def parse(*arguments: str, file: object = None, tmp_path: Path | None = None) -> Config:
    if file is not None:
        assert tmp_path is not None
        path = tmp_path / "daemon.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        arguments += ("--config-file", str(path))
    return config.parse(arguments)


def test_defaults_are_those_of_balena_engine() -> None:
    found = parse()

    assert found.hosts == DEFAULT_HOSTS
    assert found.data_root == Path("/var/lib/balena-engine")
    assert found.live_restore is True


def test_flags_that_meta_balena_passes_are_read() -> None:
    found = parse(
        "-H", "fd://", "--log-driver", "journald", "--storage-driver", "overlay2", "--delta-data-root=/mnt/sysroot",
        "--delta-storage-driver", "overlay2", "--max-download-attempts=10", "--exec-opt", "native.cgroupdriver=systemd",
        "--dns=10.114.102.1", "--bip", "10.114.101.1/24", "--fixed-cidr=10.114.101.0/25",
        "--add-runtime", "bare=/bin/x",
    )  # fmt: skip

    assert found.hosts == ("fd://",)
    assert found.cgroup_driver == "systemd"
    assert found.bip == "10.114.101.1/24"
    assert found.runtimes == {"bare": "/bin/x"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nope"], "unknown flag: --nope"),
        (["--debg=true"], "unknown flag: --debg"),
        (["start"], "unknown command: start"),
        (["--mtu", "big"], 'invalid argument for "--mtu" flag'),
        (["--debug=perhaps"], 'invalid argument for "--debug" flag'),
        (["--storage-driver", "btrfs"], "driver not supported: btrfs"),
        (["--exec-opt", "native.umask=1"], "invalid option: native.umask"),
        (["--default-ulimit", "nofile=9:3"], "soft limit must be less"),
        (["--default-ulimit", "files=9"], "invalid ulimit type: files"),
        (["--label", "plain"], "bad attribute format: plain"),
        (["--dns", "not-an-address"], "not-an-address"),
        (["-H", "http://x"], "Invalid bind address format: http://x"),
        (["-H", "unix://relative"], "Invalid bind address format"),
        (["-H", "tcp://0.0.0.0:2375"], "without --tlsverify"),
        (["--tlsverify"], "--tlsverify needs"),
        (["--default-runtime", "kata"], "specified default runtime 'kata' does not exist"),
        (["--api-compat", "1.38"], "must be between 1.39 and 1.44"),
        (["--api-compat", "1.45"], "invalid API version '1.45'"),
        (["--api-compat", "latest"], "invalid API version 'latest'"),
        (["--log-driver", "splunk"], "no log driver named 'splunk' is registered"),
        (["--config-file", "/nonexistent/daemon.json"], "no such file"),
    ],
)
def test_wrong_usage_is_refused_by_name(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)

    assert text in caught.value.message


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("unix:///tmp/x.sock", "unix:///tmp/x.sock"),
        ("tcp://127.0.0.1:2375", "tcp://127.0.0.1:2375"),
        ("tcp://localhost", "tcp://localhost:2375"),
        ("127.0.0.1:99", "tcp://127.0.0.1:99"),
        ("tcp://[::1]:4", "tcp://[::1]:4"),
        ("tcp://:2375", "tcp://localhost:2375"),
        ("fd://", "fd://"),
    ],
)
def test_listen_addresses_take_docker_forms(host: str, expected: str) -> None:
    assert parse("-H", host).hosts == (expected,)


def test_insecure_tcp_beyond_loopback_has_to_be_said_twice() -> None:
    assert parse("-H", "tcp://0.0.0.0:2375", "--allow-insecure-tcp").hosts == ("tcp://0.0.0.0:2375",)


def test_file_fills_what_flags_leave_open(tmp_path: Path) -> None:
    found = parse(
        "--label", "a=b",
        file={
            "debug": True,
            "log-opts": {"max-size": "1m"},
            "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 10, "Hard": 20}},
            "runtimes": {"other": {"path": "/bin/other"}},
            "default-shm-size": "8m",
            "default-address-pools": [{"base": "10.99.0.0/16", "size": 24}],
            "insecure-registries": ["10.0.0.0/8"],
        },
        tmp_path=tmp_path,
    )  # fmt: skip

    assert found.log_level == "debug"
    assert found.log_opts == {"max-size": "1m"}
    assert found.default_ulimits == {"nofile": Ulimit("nofile", 10, 20)}
    assert found.runtimes == {"other": "/bin/other"}
    assert found.default_shm_size == 8 << 20
    assert found.default_address_pools == ("10.99.0.0/16:24",)
    assert found.labels == ("a=b",)


def test_unknown_key_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="don't match any configuration option: nope"):
        parse(file={"nope": 1, "debug": True}, tmp_path=tmp_path)


def test_option_in_both_places_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"both as a flag and in the configuration file: mtu: \(from flag: 9000, from"):
        parse("--mtu", "9000", file={"mtu": 1400}, tmp_path=tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"mtu": "x"}', '{"debug": 3}', '{"runtimes": {"a": {}}}'])
def test_broken_file_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        parse(file=content, tmp_path=tmp_path)


def test_empty_file_is_as_none(tmp_path: Path) -> None:
    assert parse(file="", tmp_path=tmp_path).hosts == DEFAULT_HOSTS


def test_reload_takes_only_what_may_change(tmp_path: Path) -> None:
    before = parse(file={"debug": False, "mtu": 1400}, tmp_path=tmp_path)
    (tmp_path / "daemon.json").write_text('{"debug": true, "mtu": 9000, "max-concurrent-downloads": 7}')

    after, changed = config.reload(before)

    assert (after.log_level, after.mtu, after.max_concurrent_downloads) == ("debug", 1400, 7)
    assert set(changed) == {"debug", "max_concurrent_downloads"}
