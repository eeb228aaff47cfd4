"""docker-py 7: what Python programs ask of the engine."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import LogConfig, Mount, Ulimit

from tests.compat import images
from tests.engine_process import EngineProcess, wait_until

pytestmark = [
    pytest.mark.root,
    # docker-py leaves the sockets of streams to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def client(engine: EngineProcess) -> docker.DockerClient:
    return engine.client()


def start(client: docker.DockerClient, image: str, command: Any = ("sleep", "1000"), **options: Any) -> Container:
    return client.containers.run(
        image, list(command) if not isinstance(command, str) else command, detach=True, **options
    )


def shell(client: docker.DockerClient, image: str, script: str, **options: Any) -> Container:
    return start(client, image, ["sh", "-c", script], **options)


def test_the_daemon_introduces_itself(client: docker.DockerClient, engine: EngineProcess) -> None:
    negotiated = docker.DockerClient(base_url=f"unix://{engine.socket}", version="auto")
    version = client.version()
    info = client.info()

    assert client.ping() is True
    assert negotiated.api.api_version == ("1.41" if engine.is_reference else "1.39")
    negotiated.close()
    assert version["ApiVersion"] == ("1.41" if engine.is_reference else "1.39")
    assert version["MinAPIVersion"] == "1.12"
    assert version["Os"] == "linux"
    assert version["Components"][0]["Name"] == "Engine"
    assert engine.is_reference or version["Engine"] == "balena-engine"
    assert info["Driver"] == "overlay2"
    assert info["OSType"] == "linux"
    assert info["NCPU"] >= 1
    assert info["DockerRootDir"] == str(engine.data_root)
    assert info["LiveRestoreEnabled"] is not engine.is_reference
    assert {"bridge", "host", "null"} <= set(info["Plugins"]["Network"])


def test_pull_as_a_stream_of_objects(client: docker.DockerClient, registry: str) -> None:
    layers = tuple(images.Layer(images.make_tar([images.file(f"py{n}", bytes(3000))])) for n in range(2))
    digest = images.push(registry, "pulled-py", "1", images.Image(layers))

    lines = list(client.api.pull(f"{registry}/pulled-py", tag="1", stream=True, decode=True))
    image = client.images.get(f"{registry}/pulled-py:1")
    again = client.images.pull(f"{registry}/pulled-py", tag="1")

    assert lines[0] == {"status": "Pulling from pulled-py", "id": "1"}
    assert sum(line["status"] == "Pull complete" for line in lines if "status" in line) == 2
    short = {images.digest(layer.blob).removeprefix("sha256:")[:12] for layer in layers}
    assert {line["id"] for line in lines if line.get("status") == "Pull complete"} == short
    assert lines[-2] == {"status": f"Digest: {digest}"}
    assert lines[-1] == {"status": f"Status: Downloaded newer image for {registry}/pulled-py:1"}
    assert image.id == again.id == images.Image(layers).image_id
    assert image.tags == [f"{registry}/pulled-py:1"]
    assert image.attrs["RepoDigests"] == [f"{registry}/pulled-py@{digest}"]
    assert [entry["Size"] for entry in image.history()] == [0, 3000, 3000]
    client.images.remove(f"{registry}/pulled-py:1")
    with pytest.raises(ImageNotFound, match="No such image"):
        client.images.get(f"{registry}/pulled-py:1")


def test_tags_lists_and_conflicts_of_images(client: docker.DockerClient, busybox: str) -> None:
    image = client.images.get(busybox)

    assert image.tag("kept/elsewhere", tag="7") is True
    image.reload()
    names = {name for one in client.images.list() for name in one.tags}
    filtered = client.images.list(filters={"reference": "kept/*"})
    container = client.containers.create("kept/elsewhere:7", ["true"])
    client.images.remove("kept/elsewhere:7")

    assert "kept/elsewhere:7" in names
    assert [one.id for one in filtered] == [image.id]
    with pytest.raises(APIError, match="conflict: unable to remove repository reference") as refused:
        client.images.remove(busybox)
    assert refused.value.status_code == 409
    container.remove()
    with pytest.raises(APIError) as bad:
        client.images.get("UPPER")
    assert bad.value.status_code in (400, 404)
    assert client.images.prune()["SpaceReclaimed"] == 0


def test_run_returns_output_or_raises_with_the_status(client: docker.DockerClient, busybox: str) -> None:
    output = client.containers.run(busybox, ["sh", "-c", "echo out; echo err >&2"], remove=True)
    both = client.containers.run(busybox, ["sh", "-c", "echo out; echo err >&2"], remove=True, stderr=True)

    assert output == b"out\n"
    assert sorted(both.splitlines()) == [b"err", b"out"]
    with pytest.raises(docker.errors.ContainerError) as failed:
        client.containers.run(busybox, ["sh", "-c", "echo sorry >&2; exit 9"], remove=True)
    assert failed.value.exit_status == 9
    assert failed.value.stderr == b"sorry\n"
    with pytest.raises(APIError, match="executable file not found") as missing:
        client.containers.run(busybox, ["no-such-command"], remove=True)
    assert missing.value.status_code == 400
    with pytest.raises(APIError, match="permission denied") as forbidden:
        client.containers.run(busybox, ["/etc/passwd"], remove=True)
    assert forbidden.value.status_code == 400
    with pytest.raises(NotFound, match="No such image"):
        client.api.create_container("nothing/here:1")
    # docker-py removes after a run; what never ran stays, as `created`.
    assert [one.status for one in client.containers.list(all=True)] == ["created", "created"]


def test_attributes_of_a_container(client: docker.DockerClient, busybox: str, engine: EngineProcess) -> None:
    container = start(client, busybox, name="named", labels={"a": "b"}, environment={"K": "v"}, hostname="box")
    attributes = container.attrs

    assert container.status in ("created", "running")
    container.reload()
    assert container.status == "running"
    assert container.name == "named"
    assert container.labels == {"a": "b"}
    assert container.image.id == images.busybox_image().image_id
    assert "K=v" in attributes["Config"]["Env"]
    assert attributes["Config"]["Hostname"] == "box"
    assert attributes["HostConfig"]["NetworkMode"] in ("default", "bridge")
    network = container.attrs["NetworkSettings"]
    assert network["IPAddress"].startswith(engine.subnet.rsplit(".", 1)[0])
    assert network["Gateway"] == engine.gateway
    assert network["IPPrefixLen"] == 24
    assert re.fullmatch("02:42(:[0-9a-f]{2}){4}", network["MacAddress"])
    assert network["Networks"]["bridge"]["IPAddress"] == network["IPAddress"]
    assert [one.id for one in client.containers.list(filters={"label": "a=b"})] == [container.id]
    assert client.containers.list(filters={"status": "exited"}) == []
    assert client.containers.get(container.short_id).id == container.id
    assert client.containers.get("named").id == container.id
    entry = client.api.containers(size=True)[0]
    assert entry["Names"] == ["/named"]
    assert entry["Command"] == "sleep 1000"
    assert entry["State"] == "running"
    assert entry["SizeRootFs"] > 500_000
    with pytest.raises(NotFound, match="No such container: ghost"):
        client.containers.get("ghost")


def test_exec_with_everything(client: docker.DockerClient, busybox: str) -> None:
    container = start(client, busybox)

    plain = container.exec_run(["sh", "-c", "echo out; echo err >&2; exit 4"], demux=True)
    dressed = container.exec_run(
        "sh -c 'echo $V $(pwd) $(id -u)'", environment={"V": "x"}, workdir="/tmp", user="nobody"
    )
    streamed = b"".join(container.exec_run("seq 3", stream=True).output)
    missing = container.exec_run("no-such-command")
    on_tty = container.exec_run("tty", tty=True)

    assert plain == (4, (b"out\n", b"err\n"))
    assert dressed == (0, b"x /tmp 65534\n")
    assert streamed == b"1\n2\n3\n"
    assert missing.exit_code in (126, 127)
    assert b"executable file not found" in missing.output
    assert on_tty.output.startswith(b"/dev/pts/")
    assert on_tty.output.endswith(b"\r\n")
    exec_id = client.api.exec_create(container.id, ["sleep", "1000"], user="nobody")["Id"]
    before = client.api.exec_inspect(exec_id)
    client.api.exec_start(exec_id, detach=True)
    during = client.api.exec_inspect(exec_id)
    assert (before["Running"], before["ExitCode"], before["ProcessConfig"]["entrypoint"]) == (False, None, "sleep")
    assert (during["Running"], during["ProcessConfig"]["user"]) == (True, "nobody")
    assert during["Pid"] > 0
    container.reload()
    assert container.attrs["ExecIDs"] == [exec_id]
    with pytest.raises(APIError, match="is already running") as again:
        client.api.exec_start(exec_id, detach=True)
    assert again.value.status_code == 409
    container.kill()
    wait_until(lambda: client.api.exec_inspect(exec_id)["ExitCode"] == 137)
    with pytest.raises(APIError, match="is not running"):
        container.exec_run("true")


def test_exec_over_a_socket_with_half_close(client: docker.DockerClient, busybox: str) -> None:
    container = start(client, busybox)
    exec_id = client.api.exec_create(container.id, ["sh", "-c", "cat; echo end >&2"], stdin=True)["Id"]

    stream = client.api.exec_start(exec_id, socket=True)
    raw = stream._sock
    raw.sendall(b"through")
    raw.shutdown(1)
    frames = read_frames(raw)
    stream.close()
    raw.close()

    assert frames == {1: b"through", 2: b"end\n"}
    wait_until(lambda: client.api.exec_inspect(exec_id)["ExitCode"] == 0)


def read_frames(connection: Any) -> dict[int, bytes]:
    """Everything on a multiplexed connection until it ends, by stream."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    streams: dict[int, bytes] = {}
    while data:
        length = int.from_bytes(data[4:8], "big")
        streams[data[0]] = streams.get(data[0], b"") + data[8 : 8 + length]
        data = data[8 + length :]
    return streams


def test_attach_before_start_loses_nothing(client: docker.DockerClient, busybox: str) -> None:
    once = client.api._post_json(
        client.api._url("/containers/create"),
        {
            "Image": busybox,
            "Cmd": ["sh", "-c", "echo first; cat; exit 3"],
            "OpenStdin": True,
            "StdinOnce": True,
            "AttachStdin": True,
            "AttachStdout": True,
        },
    ).json()["Id"]
    stream = client.api.attach_socket(once, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
    raw = stream._sock
    client.api.start(once)
    raw.sendall(b"given")
    raw.shutdown(1)
    frames = read_frames(raw)
    stream.close()
    raw.close()

    assert frames == {1: b"first\ngiven"}
    assert client.api.wait(once)["StatusCode"] == 3


def test_logs_in_every_way(client: docker.DockerClient, busybox: str) -> None:
    container = shell(client, busybox, "for n in 1 2 3; do echo $n; sleep 0.02; done; echo e >&2")
    container.wait()

    assert container.logs(stderr=False) == b"1\n2\n3\n"
    assert container.logs(stdout=False) == b"e\n"
    wait_until(lambda: container.logs().count(b"\n") == 4)
    assert container.logs(tail=1) == b"e\n"
    assert container.logs(tail=0) == b""
    stamped = container.logs(timestamps=True, stderr=False).splitlines()
    assert all(re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z \d", line) for line in stamped)
    assert list(container.logs(stream=True, follow=True, stderr=False)) == [b"1\n", b"2\n", b"3\n"]
    assert container.logs(since=int(time.time()) + 100) == b""
    with pytest.raises(APIError, match="you must choose at least one stream"):
        client.api.logs(container.id, stdout=False, stderr=False)


def test_follow_ends_with_the_container(client: docker.DockerClient, busybox: str) -> None:
    container = shell(client, busybox, "n=0; while [ ! -e /stop ]; do n=$((n+1)); echo $n; sleep 0.02; done")
    seen: list[bytes] = []

    for line in container.logs(stream=True, follow=True):
        seen.append(line)
        if len(seen) == 5:
            container.exec_run("touch /stop")

    assert seen[:5] == [b"1\n", b"2\n", b"3\n", b"4\n", b"5\n"]
    assert container.wait()["StatusCode"] == 0


def test_wait_for_each_condition(client: docker.DockerClient, busybox: str, engine: EngineProcess) -> None:
    exits = shell(client, busybox, "exit 5", name="exits")
    assert exits.wait() == {"Error": None, "StatusCode": 5}
    answers: dict[str, Any] = {}
    container = client.containers.create(busybox, ["sh", "-c", "sleep 0.3; exit 8"], auto_remove=True)

    def wait(condition: str) -> None:
        other = docker.DockerClient(
            base_url=client.api._custom_adapter.socket_path.join(["unix://", ""]), version="1.39"
        )
        answers[condition] = other.api.wait(container.id, condition=condition)["StatusCode"]
        other.close()

    threads = [threading.Thread(target=wait, args=(condition,)) for condition in ("next-exit", "removed")]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    container.start()
    for thread in threads:
        thread.join(10)

    assert answers == {"next-exit": 8, "removed": 8}
    with pytest.raises(NotFound):
        container.reload()


def test_kill_stop_restart_pause_and_their_answers(client: docker.DockerClient, busybox: str) -> None:
    container = shell(client, busybox, 'trap "echo hup" HUP; trap "exit 2" TERM; echo up; while :; do sleep 0.05; done')
    wait_until(lambda: b"up" in container.logs())

    container.kill("SIGHUP")
    wait_until(lambda: b"hup" in container.logs())
    container.stop(timeout=5)
    assert container.wait()["StatusCode"] == 2
    container.stop()  # 304: nothing to do
    container.restart(timeout=0)
    container.reload()
    assert container.status == "running"
    container.pause()
    container.reload()
    assert container.status == "paused"
    assert container.attrs["State"]["Running"] is True
    with pytest.raises(APIError, match="already paused"):
        container.pause()
    container.unpause()
    with pytest.raises(APIError, match="is not paused"):
        container.unpause()
    with pytest.raises(APIError, match=r"[Ii]nvalid signal: WHAT") as bad:
        container.kill("WHAT")
    assert bad.value.status_code == 400
    container.kill(9)
    assert container.wait()["StatusCode"] == 137
    with pytest.raises(APIError, match="is not running") as late:
        container.kill()
    assert late.value.status_code == 409
    with pytest.raises(APIError, match="is not running"):
        container.pause()
    container.rename("renamed")
    assert client.containers.get("renamed").id == container.id
    with pytest.raises(APIError, match="Renaming a container with the same name") as same:
        container.rename("renamed")
    assert same.value.status_code == 400


def test_restart_policy_counts(client: docker.DockerClient, busybox: str) -> None:
    container = shell(client, busybox, "echo x; exit 1", restart_policy={"Name": "on-failure", "MaximumRetryCount": 3})

    wait_until(lambda: (container.reload(), container.attrs["RestartCount"] == 3 and container.status == "exited")[1])
    assert container.logs().count(b"x\n") == 4
    container.update(restart_policy={"Name": "always"})
    container.reload()
    assert container.attrs["HostConfig"]["RestartPolicy"]["Name"] == "always"
    with pytest.raises(APIError, match="maximum retry count cannot be used with restart policy"):
        client.containers.create(busybox, restart_policy={"Name": "always", "MaximumRetryCount": 1})


def test_events_live_and_filtered(client: docker.DockerClient, busybox: str, engine: EngineProcess) -> None:
    other = engine.client()
    stream = other.events(decode=True, filters={"type": "container", "label": "watched"})
    time.sleep(0.1)

    container = start(client, busybox, name="seen", labels={"watched": "1"}, auto_remove=False)
    container.kill()
    container.remove()
    events = [next(stream) for _ in range(5)]
    stream.close()

    assert [event["Action"] for event in events] == ["create", "start", "kill", "die", "destroy"]
    assert {event["Actor"]["ID"] for event in events} == {container.id}
    assert events[2]["Actor"]["Attributes"]["signal"] == "9"
    assert events[3]["Actor"]["Attributes"]["exitCode"] == "137"
    assert all(event["Actor"]["Attributes"]["name"] == "seen" for event in events)
    assert all(event["time"] == event["timeNano"] // 10**9 for event in events)


def test_published_ports(client: docker.DockerClient, busybox: str) -> None:
    command = ["sh", "-c", "mkdir /w; echo hi > /w/index.html; httpd -f -p 8000 -h /w"]
    container = start(client, busybox, command, ports={"8000/tcp": ("127.0.0.1", None), "9/udp": None}, name="web")
    container.reload()
    port = container.ports["8000/tcp"][0]["HostPort"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch() -> bytes | None:
        try:
            with opener.open(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return answer.read()
        except OSError:
            return None

    assert wait_until(fetch) == b"hi\n"
    assert container.ports["8000/tcp"][0]["HostIp"] == "127.0.0.1"
    assert int(container.ports["9/udp"][0]["HostPort"]) > 0
    listed = client.api.containers()[0]["Ports"]
    assert {"IP": "127.0.0.1", "PrivatePort": 8000, "PublicPort": int(port), "Type": "tcp"} in listed
    second = client.containers.create(busybox, ["true"], ports={"8000/tcp": ("127.0.0.1", int(port))})
    with pytest.raises(APIError, match="port is already allocated") as taken:
        second.start()
    assert taken.value.status_code == 500
    second.reload()
    assert second.status == "created"
    assert second.attrs["State"]["ExitCode"] == 128
    container.stop(timeout=0)
    container.reload()
    assert container.ports == {}


def test_volumes_and_mounts(client: docker.DockerClient, busybox: str, app: str, tmp_path: Path) -> None:
    volume = client.volumes.create("py-store", labels={"k": "v"})
    (tmp_path / "f").write_text("host")

    client.containers.run(
        busybox, ["sh", "-c", "echo in > /d/f"], volumes={"py-store": {"bind": "/d", "mode": "rw"}}, remove=True
    )
    mounts = [
        Mount("/d", "py-store", type="volume", read_only=True),
        Mount("/b", str(tmp_path), type="bind"),
        Mount("/t", None, type="tmpfs", tmpfs_size=1 << 20),
    ]
    output = client.containers.run(
        busybox, ["sh", "-c", "cat /d/f /b/f; touch /d/x || grep ' /t ' /proc/mounts"], mounts=mounts, remove=True
    )
    holder = client.containers.create(app, volumes=["/data"], name="holder")

    assert volume.attrs["Labels"] == {"k": "v"}
    assert (Path(volume.attrs["Mountpoint"]) / "f").read_text() == "in\n"
    assert output.startswith(b"in\nhost")
    assert b"tmpfs /t tmpfs rw" in output
    inspected = holder.attrs["Mounts"]
    assert [(one["Type"], one["Destination"], one["RW"]) for one in inspected] == [("volume", "/data", True)]
    assert len(inspected[0]["Name"]) == 64
    assert (Path(inspected[0]["Source"]) / "seed").read_text() == "from the image\n"
    assert {one.name for one in client.volumes.list()} == {"py-store", inspected[0]["Name"]}
    assert [one.name for one in client.volumes.list(filters={"dangling": True})] == ["py-store"]
    with pytest.raises(APIError, match="volume is in use") as used:
        client.volumes.get(inspected[0]["Name"]).remove()
    assert used.value.status_code == 409
    holder.remove(v=True)
    with pytest.raises(NotFound, match="no such volume"):
        client.volumes.get(inspected[0]["Name"])
    volume.remove()
    assert client.volumes.list() == []
    with pytest.raises(APIError, match="bind source path does not exist"):
        client.containers.create(busybox, mounts=[Mount("/b", "/no/such/path", type="bind")])
    with pytest.raises(APIError, match="includes invalid characters for a local volume name"):
        client.volumes.create("bad/name")


def test_top_stats_update_and_prune(client: docker.DockerClient, busybox: str) -> None:
    container = start(client, busybox, mem_limit="64m", pids_limit=50)

    top = container.top()
    stats = container.stats(stream=False)
    container.update(mem_limit="48m", memswap_limit="96m")
    container.reload()
    stopped = client.containers.create(busybox)
    pruned = client.containers.prune()

    assert top["Titles"][-1] == "CMD"
    assert top["Processes"][0][-1] == "sleep 1000"
    assert stats["memory_stats"]["limit"] == 64 << 20
    assert stats["memory_stats"]["usage"] > 0
    assert stats["pids_stats"]["current"] == 1
    assert stats["cpu_stats"]["system_cpu_usage"] > stats["precpu_stats"]["system_cpu_usage"]
    assert stats["networks"]["eth0"]["rx_packets"] >= 0
    assert container.attrs["HostConfig"]["Memory"] == 48 << 20
    assert pruned["ContainersDeleted"] == [stopped.id]
    with pytest.raises(APIError, match=r"cannot remove a running container|is running: stop") as running:
        container.remove()
    assert running.value.status_code == 409
    container.remove(force=True)
    assert client.containers.list(all=True) == []


def test_options_reach_the_process(client: docker.DockerClient, busybox: str) -> None:
    script = "ulimit -n; cat /proc/sys/net/core/somaxconn; hostname; grep CapBnd /proc/self/status; id -u; umask"
    output = client.containers.run(
        busybox,
        ["sh", "-c", script],
        ulimits=[Ulimit(name="nofile", soft=123, hard=456)],
        sysctls={"net.core.somaxconn": "77"},
        hostname="deep",
        cap_drop=["ALL"],
        cap_add=["CHOWN"],
        user="65534",
        log_config=LogConfig(type="json-file", config={"max-size": "1m"}),
        remove=True,
    ).splitlines()

    assert output == [b"123", b"77", b"deep", b"CapBnd:\t0000000000000001", b"65534", b"0022"]


def test_disk_usage_and_raw_answers(client: docker.DockerClient, busybox: str, engine: EngineProcess) -> None:
    shell(client, busybox, "dd if=/dev/zero of=/big bs=1k count=100 2>/dev/null").wait()

    usage = client.df()
    entry = client.api.containers(all=True, size=True)[0]
    heads = engine.request("GET", "/v1.39/containers/json").headers

    assert usage["LayersSize"] > 500_000
    assert {"Images", "Containers", "Volumes"} <= set(usage)
    assert usage["Containers"][0]["SizeRw"] >= 102_400
    assert next(one for one in usage["Images"] if busybox in one["RepoTags"])["Containers"] == 1
    assert entry["SizeRw"] >= 102_400
    assert heads["content-type"] == "application/json"
    assert heads["ostype"] == "linux"
    assert heads["server"].startswith("Docker/")
    assert heads["api-version"] == ("1.41" if engine.is_reference else "1.39")


def test_what_the_engine_does_not_know(client: docker.DockerClient, engine: EngineProcess) -> None:
    assert engine.request("GET", "/v1.39/nope").status == 404
    assert engine.request("GET", "/v1.39/nope").json == {"message": "page not found"}
    assert engine.request("GET", "/v9.99/containers/json").status == 400
    assert "client version 9.99 is too new" in engine.request("GET", "/v9.99/containers/json").message
    assert engine.request("GET", "/v1.39/networks/nothing").message == "network nothing not found"
    assert client.networks.get("bridge").attrs["Driver"] == "bridge"
    assert {"bridge", "host", "none"} <= {network.name for network in client.networks.list()}
    assert client.networks.get("host").attrs["Scope"] == "local"
