from __future__ import annotations

from balenapy.core.links import Link, link_env
from balenapy.core.ports import ExposedPort


def test_a_link_tells_name_ports_and_environment() -> None:
    link = Link("web", "my-db", "10.0.0.2", [ExposedPort(5432, "tcp")], ["USER=x", "PATH=/bin", "BARE"])

    assert link_env(link) == [
        "MY_DB_PORT=tcp://10.0.0.2:5432",
        "MY_DB_PORT_5432_TCP=tcp://10.0.0.2:5432",
        "MY_DB_PORT_5432_TCP_ADDR=10.0.0.2",
        "MY_DB_PORT_5432_TCP_PORT=5432",
        "MY_DB_PORT_5432_TCP_PROTO=tcp",
        "MY_DB_NAME=/web/my-db",
        "MY_DB_ENV_USER=x",
    ]


def test_ports_that_follow_each_other_are_told_as_a_range_too() -> None:
    ports = [ExposedPort(number, "tcp") for number in (90, 82, 81, 80)]

    env = link_env(Link("web", "db", "10.0.0.2", ports, []))

    assert env[:7] == [
        "DB_PORT_80_TCP_START=tcp://10.0.0.2:80",
        "DB_PORT_80_TCP_ADDR=10.0.0.2",
        "DB_PORT_80_TCP_PROTO=tcp",
        "DB_PORT_80_TCP_PORT_START=80",
        "DB_PORT_82_TCP_END=tcp://10.0.0.2:82",
        "DB_PORT_82_TCP_PORT_END=82",
        "DB_PORT=tcp://10.0.0.2:80",
    ]
    assert env[-1] == "DB_NAME=/web/db"


def test_a_child_without_ports_has_only_a_name() -> None:
    assert link_env(Link("web", "db", "10.0.0.2", [], [])) == ["DB_NAME=/web/db"]
