"""aiodocker: the client of asyncio programs (Home Assistant's supervisor among them)."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Awaitable, Callable
from typing import Any

import aiodocker
import pytest
from aiodocker.exceptions import DockerError

from tests.engine_process import EngineProcess

pytestmark = [
    pytest.mark.root,
    # aiohttp leaves transports to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

Scenario = Callable[[aiodocker.Docker], Awaitable[Any]]


def run(engine: EngineProcess, scenario: Scenario, version: str = "v1.39") -> Any:
    async def main() -> Any:
        async with aiodocker.Docker(url=f"unix://{engine.socket}", api_version=version) as docker:
            async with asyncio.timeout(90):
                return await scenario(docker)

    return asyncio.run(main())


async def started(docker: aiodocker.Docker, image: str, script: str, **config: Any) -> Any:
    return await docker.containers.run({"Image": image, "Cmd": ["sh", "-c", script], **config})


def test_the_daemon_and_negotiation(engine: EngineProcess) -> None:
    async def scenario(docker: aiodocker.Docker) -> Any:
        return await docker.version(), await docker.system.info(), docker.api_version

    version, info, _ = run(engine, scenario)
    _, _, negotiated = run(engine, scenario, "auto")

    assert version["Os"] == info["OSType"] == "linux"
    assert negotiated == ("v1.41" if engine.is_reference else "v1.39")


def test_images(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> None:
        lines = [line async for line in docker.images.pull(busybox, stream=True)]
        assert lines[-1]["status"] == f"Status: Image is up to date for {busybox}"
        inspected = await docker.images.inspect(busybox)
        assert inspected["Config"]["Cmd"] == ["sh"]
        await docker.images.tag(busybox, repo="aio/renamed", tag="1")
        assert "aio/renamed:1" in [tag for image in await docker.images.list() for tag in image["RepoTags"] or []]
        assert len(await docker.images.history("aio/renamed:1")) == 3
        async with docker.images.export_image("aio/renamed:1") as content:
            saved = await content.read()
        assert await docker.images.delete("aio/renamed:1") == [{"Untagged": "aio/renamed:1"}]
        loaded = [line async for line in docker.images.import_image(io.BytesIO(saved), stream=True)]
        assert "Loaded image: aio/renamed:1" in "".join(line.get("stream", "") for line in loaded)
        await docker.images.delete("aio/renamed:1")
        with pytest.raises(DockerError) as missing:
            await docker.images.inspect("aio/nothing")
        assert missing.value.status == 404

    run(engine, scenario)


def test_a_containers_life(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> None:
        config = {"Image": busybox, "Cmd": ["sh", "-c", "echo out; echo err >&2; exit 7"], "Labels": {"a": "b"}}
        container = await docker.containers.create_or_replace("aio", config)
        await container.start()
        assert (await container.wait())["StatusCode"] == 7
        assert await container.log(stdout=True) == ["out\n"]
        assert await container.log(stderr=True) == ["err\n"]
        shown = await container.show()
        assert shown["State"]["ExitCode"] == 7
        replaced = await docker.containers.create_or_replace("aio", {**config, "Cmd": ["sleep", "1000"]})
        assert replaced.id != container.id
        await replaced.start()
        await replaced.pause()
        await replaced.unpause()
        await replaced.rename("oia")
        stats = await replaced.stats(stream=False)
        assert stats[0]["pids_stats"]["current"] == 1
        assert [one.id for one in await docker.containers.list(filters={"label": ["a=b"]})] == [replaced.id]
        await replaced.restart(timeout=0)
        await replaced.kill(signal="KILL")
        await replaced.wait()
        await replaced.delete(force=True)
        with pytest.raises(DockerError) as gone:
            await replaced.show()
        assert gone.value.status == 404

    run(engine, scenario)


def test_logs_are_followed(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> list[str]:
        container = await started(docker, busybox, "for i in 1 2 3; do echo $i; sleep 0.1; done")
        return [line async for line in container.log(stdout=True, follow=True)]

    assert "".join(run(engine, scenario)) == "1\n2\n3\n"


def test_exec_and_attach(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> None:
        container = await started(docker, busybox, "cat", OpenStdin=True, StdinOnce=True)
        exec_ = await container.exec(["sh", "-c", "read x; echo got $x; echo bad >&2; exit 3"], stdin=True)
        async with exec_.start(detach=False) as stream:
            await stream.write_in(b"this\n")
            said = {}
            while message := await stream.read_out():
                said[message.stream] = said.get(message.stream, b"") + message.data
        assert said == {1: b"got this\n", 2: b"bad\n"}
        assert (await exec_.inspect())["ExitCode"] == 3
        async with container.attach(stdin=True, stdout=True, stderr=True) as stream:
            await stream.write_in(b"echoed\n")
            message = await stream.read_out()
        assert message is not None and message.data == b"echoed\n"

    run(engine, scenario)


def test_files_go_in_and_out(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> None:
        container = await started(docker, busybox, "sleep 1000")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("put")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        await container.put_archive("/tmp", buffer.getvalue())
        got = await container.get_archive("/tmp/put")
        content = got.extractfile("put")
        assert content is not None and content.read() == b"data"

    run(engine, scenario)


def test_events_networks_and_volumes(engine: EngineProcess, busybox: str) -> None:
    async def scenario(docker: aiodocker.Docker) -> None:
        events = docker.events.subscribe()
        volume = await docker.volumes.create({"Name": "aio-volume", "Labels": {"x": "y"}})
        network = await docker.networks.create({"Name": "aio-network", "Driver": "bridge"})
        container = await started(
            docker,
            busybox,
            "echo kept > /v/file; sleep 1000",
            HostConfig={"Binds": ["aio-volume:/v"], "NetworkMode": "aio-network"},
        )
        assert container.id in (await network.show())["Containers"]
        await network.disconnect({"Container": container.id})
        assert (await network.show())["Containers"] == {}
        seen = set()
        while ("container", "start") not in seen:
            event = await events.get()
            seen.add((event["Type"], event["Action"]))
        assert {("network", "create"), ("container", "create")} <= seen
        await container.delete(force=True)
        await network.delete()
        assert (await volume.show())["Labels"] == {"x": "y"}
        await volume.delete()
        await docker.events.stop()

    run(engine, scenario)
