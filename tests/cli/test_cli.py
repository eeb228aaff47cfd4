"""The command line client: what it sends and what it prints."""

from __future__ import annotations

import argparse
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from balenapy.cli.client import Client, ClientError, EngineAnswer
from balenapy.cli.containers import create_body
from balenapy.cli.format import human_size, ports, table
from balenapy.cli.images import parse_filters, split_reference
from balenapy.cli.main import build_parser, main
from balenapy.cli.system import parse_moment
from balenapy.cli.terminal import HEADER, Frames
from balenapy.core.timefmt import SECOND_NS, human_duration


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def body(*arguments: str) -> dict[str, Any]:
    return create_body(options("run", *arguments), detached=False)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (4_262_000, "4.262MB"), (1_234_567_890, "1.235GB")],
)
def test_sizes_are_decimal_with_four_digits(size: int, expected: str) -> None:
    assert human_size(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (120, "2 minutes"),
        (3600, "About an hour"), (7200, "2 hours"), (48 * 3600, "2 days"), (14 * 86400, "2 weeks"),
        (60 * 86400, "2 months"), (800 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_durations_are_told_as_docker_tells_them(seconds: float, expected: str) -> None:
    assert human_duration(int(seconds * SECOND_NS)) == expected


def test_columns_are_three_blanks_apart_and_ten_wide() -> None:
    assert table(["A", "LONGER NAME", "C"], [["x", "y", "z"]]) == "A         LONGER NAME   C\nx         y             z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", ("busybox", "latest")),
        ("localhost:5000/a/b", ("localhost:5000/a/b", "latest")),
        ("localhost:5000/a:1.0", ("localhost:5000/a", "1.0")),
        ("a@sha256:00", ("a", "sha256:00")),
    ],
)
def test_references_are_split_at_the_tag_not_at_the_port(text: str, expected: tuple[str, str]) -> None:
    assert split_reference(text) == expected


def test_published_ports_take_addresses_ranges_and_protocols() -> None:
    found = body("-p", "8080:80", "-p", "127.0.0.1:53:53/udp", "-p", "7000-7001:70-71", "-p", "9", "x")

    assert found["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "", "HostPort": "8080"}],
        "53/udp": [{"HostIp": "127.0.0.1", "HostPort": "53"}],
        "70/tcp": [{"HostIp": "", "HostPort": "7000"}],
        "71/tcp": [{"HostIp": "", "HostPort": "7001"}],
        "9/tcp": [{"HostIp": "", "HostPort": ""}],
    }
    assert set(found["ExposedPorts"]) == set(found["HostConfig"]["PortBindings"])


def test_what_follows_the_image_belongs_to_the_container() -> None:
    found = body("--rm", "busybox", "sh", "-c", "echo --rm -d")

    assert (found["Image"], found["Cmd"], found["HostConfig"]["AutoRemove"]) == (
        "busybox",
        ["sh", "-c", "echo --rm -d"],
        True,
    )


def test_binds_and_anonymous_volumes_part_ways() -> None:
    found = body("-v", "/a:/b:ro", "-v", "/data", "--mount", "type=tmpfs,dst=/t,tmpfs-size=1m", "x")

    assert found["HostConfig"]["Binds"] == ["/a:/b:ro"]
    assert found["Volumes"] == {"/data": {}}
    assert found["HostConfig"]["Mounts"] == [{"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1 << 20}}]


def test_limits_are_read_in_docker_units() -> None:
    found = body("-m", "64m", "--cpus", "1.5", "--ulimit", "nofile=10:20", "--restart", "on-failure:3", "x")
    host = found["HostConfig"]

    assert (host["Memory"], host["NanoCpus"]) == (64 << 20, 1_500_000_000)
    assert host["Ulimits"] == [{"Name": "nofile", "Soft": 10, "Hard": 20}]
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}


@pytest.mark.parametrize("wrong", [["-p", "a:b"], ["--mount", "zz=1"], ["--ulimit", "files=3"], ["-p", "1-2:1-3"]])
def test_unreadable_values_are_refused(wrong: list[str]) -> None:
    with pytest.raises(ClientError):
        body(*wrong, "x")


def test_frames_are_split_however_they_arrive(capfd: pytest.CaptureFixture[str]) -> None:
    stream = HEADER.pack(1, 3) + b"out" + HEADER.pack(2, 3) + b"err" + HEADER.pack(1, 1) + b"\n"
    frames = Frames(multiplexed=True)
    for index in range(len(stream)):
        frames.write(stream[index : index + 1])

    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err")


def test_port_column_reads_as_docker_prints_it() -> None:
    found = ports([
        {"PrivatePort": 443, "Type": "tcp"},
        {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
    ])  # fmt: skip

    assert found == "0.0.0.0:8080->80/tcp, 443/tcp"


def test_filters_and_moments_are_read() -> None:
    assert parse_filters(["label=a=b", "label=c"]) == {"label": {"a=b": True, "c": True}}
    assert parse_moment("1700000000.5") == "1700000000.5"
    assert parse_moment("2023-11-14T22:13:20Z") == "1700000000.000000000"
    with pytest.raises(ClientError):
        parse_moment("yesterday")
    with pytest.raises(ClientError):
        parse_filters(["plain"])


def test_unknown_flag_and_no_engine_have_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ps", "--nope"])
    assert caught.value.code == 125
    assert "unknown flag: --nope" in capsys.readouterr().err

    assert main(["-H", f"unix://{tmp_path}/none", "ps"]) == 1
    assert "Cannot connect to the engine" in capsys.readouterr().err
    assert main(["-H", f"unix://{tmp_path}/none", "run", "x"]) == 125


def serve_once(path: Path, answer: bytes) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_objects_of_a_stream_are_found_however_they_are_cut(tmp_path: Path) -> None:
    chunks = [b'{"a":1}\r\n{"b"', b":2}\r\n", b'{"c":3}']
    encoded = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    thread = serve_once(tmp_path / "s", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + encoded)

    found = list(Client(f"unix://{tmp_path}/s").request("GET", "/events").objects())

    thread.join()
    assert found == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_hijack_keeps_what_came_with_the_head(tmp_path: Path) -> None:
    head = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    thread = serve_once(tmp_path / "s", head + b"early")

    connection, leading = Client(f"unix://{tmp_path}/s").hijack("/x")
    with connection:
        rest = leading + connection.recv(10)

    thread.join()
    assert rest == b"early"


def test_error_answers_carry_the_engines_words(tmp_path: Path) -> None:
    text = b'{"message":"No such container: x"}\n'
    thread = serve_once(tmp_path / "s", b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))

    with pytest.raises(EngineAnswer) as caught:
        Client(f"unix://{tmp_path}/s").call("GET", "/containers/x/json")

    thread.join()
    assert str(caught.value) == "Error response from daemon: No such container: x"
