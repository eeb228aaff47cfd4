"""`python -m tests.bench [names]`: this engine beside dockerd and podman, whichever is there, in turns.

All run on private sockets, data roots and bridges, dockerd with its own containerd and without firewall rules, podman
by its own command line and without networks (they would change the host's firewall). Run time state is in memory, as on
a device. What is measured is what a user waits for: the client from its start to its end.
Medians, and ratios to the best of the others, come out as a table in Markdown. Nothing here asserts: a slow machine is
not a failed test.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.memory import proportional_memory
from tests.bench.shapes import big_files, small_files
from tests.compat import images
from tests.engine_process import EngineProcess, UnixHTTPConnection, running_engine, wait_until
from tests.leftovers import claim
from tests.registry_process import running_registry

PROGRAMS = ("balenapy", "dockerd", "podman")
BRIDGED = ("balenapy", "dockerd")
OBEDIENT = ["sh", "-c", 'trap "exit 0" TERM; echo up; sleep 1000 & wait']


@dataclass(frozen=True)
class Row:
    """One line of the table: the same thing of both engines."""

    name: str
    unit: str
    values: dict[str, list[float]]
    bar: str = ""  # what the project wants of itself

    def cells(self) -> list[str]:
        medians = {program: statistics.median(self.values[program]) for program in self.values}
        shown = [f"{medians[program]:.1f} {self.unit}" if program in medians else "-" for program in PROGRAMS]
        best = min((medians[program] for program in PROGRAMS[1:] if medians.get(program)), default=0.0)
        ratio = f"{medians['balenapy'] / best:.2f}" if best and "balenapy" in medians else "-"
        spread = "; ".join(f"{min(values):.1f}-{max(values):.1f}" for values in self.values.values())
        return [self.name, *shown, ratio, self.bar, spread]


@dataclass(frozen=True)
class Bench:
    """Both engines with the image in them, and the registry it came from."""

    engines: dict[str, EngineProcess]  # with Docker's API
    everyone: dict[str, EngineProcess]  # podman too
    image: str
    registry: str
    directory: Path
    rounds: int

    def in_turns(
        self, action: Callable[[EngineProcess], float], rounds: int = 0, programs: Sequence[str] = BRIDGED
    ) -> dict[str, list[float]]:
        """`action` of each engine in turn, so that what disturbs the machine disturbs all."""
        values: dict[str, list[float]] = {program: [] for program in self.everyone if program in programs}
        for number in range(rounds or self.rounds):
            order = list(values)
            for program in order if number % 2 == 0 else reversed(order):
                values[program].append(action(self.everyone[program]))
        return values


def timed(engine: EngineProcess, *arguments: str) -> float:
    """Milliseconds of one docker command."""
    begun = time.perf_counter()
    engine.docker(*arguments)
    return (time.perf_counter() - begun) * 1000


def bench_run(bench: Bench) -> Iterator[Row]:
    for network, bar in (("none", "0.5"), ("bridge", "0.5")):
        command = ["run", "--rm", "--network", network, bench.image, "true"]
        programs = PROGRAMS if network == "none" else BRIDGED
        for program, engine in bench.everyone.items():
            if program in programs:
                engine.docker(*command)
        values = bench.in_turns(lambda one, c=command: timed(one, *c), programs=programs)
        yield Row(f"run --rm true, network {network}", "ms", values, bar)


def bench_published(bench: Bench) -> Iterator[Row]:
    """Start on the bridge network with a port of the host: the call of the API, and the command."""
    ports = itertools.count(20000)

    def start(engine: EngineProcess) -> float:
        port = str(next(ports))
        body = {
            "Image": bench.image,
            "Cmd": ["sleep", "1000"],
            "ExposedPorts": {"80/tcp": {}},
            "HostConfig": {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}},
        }
        container = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
        begun = time.perf_counter()
        status = engine.request("POST", f"/v1.39/containers/{container}/start").status
        took = (time.perf_counter() - begun) * 1000
        assert status == 204
        engine.request("DELETE", f"/v1.39/containers/{container}?force=1")
        return took

    for engine in bench.engines.values():
        start(engine)
    yield Row("start, network bridge, a published port", "ms", bench.in_turns(start), "0.6")

    def run(engine: EngineProcess) -> float:
        return timed(engine, "run", "--rm", "-p", f"127.0.0.1:{next(ports)}:80", bench.image, "true")

    yield Row("run --rm true, network bridge, a published port", "ms", bench.in_turns(run), "0.6")


def bench_exec(bench: Bench) -> Iterator[Row]:
    for engine in bench.engines.values():
        engine.docker("run", "-d", "--name", "target", "--network", "none", bench.image, "sleep", "1000")
        engine.docker("exec", "target", "true")
    yield Row("exec true", "ms", bench.in_turns(lambda one: timed(one, "exec", "target", "true")), "0.8")
    for engine in bench.engines.values():
        engine.docker("rm", "-f", "target")


def bench_stop(bench: Bench) -> Iterator[Row]:
    def stop(engine: EngineProcess) -> float:
        engine.docker("run", "-d", "--name", "obedient", "--network", "none", bench.image, *OBEDIENT)
        wait_until(lambda: engine.docker("logs", "obedient").stdout == "up\n")
        took = timed(engine, "stop", "obedient")
        engine.docker("rm", "obedient")
        return took

    yield Row("stop of what obeys SIGTERM", "ms", bench.in_turns(stop), "0.6")


def bench_ps(bench: Bench) -> Iterator[Row]:
    for engine in bench.engines.values():
        for number in range(20):
            engine.docker("create", "--name", f"made{number}", bench.image)
    yield Row("ps -a of 20 containers", "ms", bench.in_turns(lambda one: timed(one, "ps", "-a")))
    for engine in bench.engines.values():
        engine.remove_containers()


API_CALLS = (
    ("_ping", "/_ping", "1 ms"),
    ("version", "/v1.39/version", "1.5 ms"),
    ("info", "/v1.39/info", "5 ms"),
    ("containers/json, 50 containers", "/v1.39/containers/json?all=1", "3 ms"),
    ("inspect of one of them", "/v1.39/containers/listed-7/json", "1.5 ms"),
)
API_ROUNDS = 200


def bench_api(bench: Bench) -> Iterator[Row]:
    """Requests on a kept connection: what an agent that polls waits for."""
    for engine in bench.engines.values():
        for number in range(50):
            body = {"Image": bench.image, "Cmd": ["sleep", "1000"], "Labels": {"io.balena.supervised": "true"}}
            body["HostConfig"] = {"NetworkMode": "none"}
            made = engine.request("POST", f"/v1.39/containers/create?name=listed-{number}", body).json["Id"]
            if number < 10:
                engine.request("POST", f"/v1.39/containers/{made}/start")
    with contextlib.ExitStack() as stack:
        connections = {
            program: stack.enter_context(contextlib.closing(UnixHTTPConnection(str(engine.socket), 60)))
            for program, engine in bench.engines.items()
        }

        def ask(engine: EngineProcess, target: str) -> float:
            connection = connections[engine.program]
            begun = time.perf_counter()
            connection.request("GET", target)
            answer = connection.getresponse()
            answer.read()
            return (time.perf_counter() - begun) * 1000

        for name, target, bar in API_CALLS:
            yield Row(f"GET {name}", "ms", bench.in_turns(lambda one, target=target: ask(one, target), API_ROUNDS), bar)
    for engine in bench.engines.values():
        engine.remove_containers()


def bench_start(bench: Bench) -> Iterator[Row]:
    ready: dict[str, list[float]] = {program: [] for program in bench.engines}

    def start(engine: EngineProcess) -> float:
        engine.stop()
        begun = time.perf_counter()
        engine.start(wait=False)
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if engine.request("GET", "/_ping", timeout_s=2).status == 200:
                    break
            time.sleep(0.005)
        took = (time.perf_counter() - begun) * 1000
        engine.wait_ready()
        ready[engine.program].append((time.perf_counter() - begun) * 1000)
        return took

    rounds = max(3, bench.rounds // 4)
    yield Row("cold start until _ping answers", "ms", bench.in_turns(start, rounds), "800 ms")
    yield Row("cold start until containers are listed", "ms", ready)


def bench_memory(bench: Bench) -> Iterator[Row]:
    fresh: dict[str, list[float]] = {program: [] for program in bench.everyone}
    one: dict[str, list[float]] = {program: [] for program in bench.everyone}
    ten: dict[str, list[float]] = {program: [] for program in bench.everyone}
    whole: dict[int, dict[str, list[float]]] = {
        count: {program: [] for program in bench.everyone} for count in (10, 50)
    }
    pulled: dict[str, list[float]] = {program: [] for program in bench.everyone}
    for program in bench.everyone:
        with running_engine(bench.directory / f"memory-{program}", program=program) as engine:
            time.sleep(2)
            fresh[program].append(proportional_memory(engine))
            engine.docker("pull", "-q", bench.image)
            engine.docker("run", "--rm", "--network", "none", bench.image, "true")
            time.sleep(2)
            base = proportional_memory(engine)
            pulled[program].append(base)
            run = ["run", "-d", "--network", "none", bench.image, "sleep", "10000"]
            engine.docker(*run)
            time.sleep(1)
            one[program].append(proportional_memory(engine) - base)
            for count, more in ((10, 9), (50, 40)):
                for _ in range(more):
                    engine.docker(*run)
                time.sleep(12)  # spare threads go after ten
                whole[count][program].append(proportional_memory(engine))
            ten[program].append((whole[10][program][-1] - base) / 10)
    yield Row("memory of the process tree (PSS), fresh", "MB", fresh, "45 MB")
    yield Row("the same after a pull and a run", "MB", pulled)
    yield Row("more for the first container", "MB", one, "1.0 MB")
    yield Row("more for each of ten containers", "MB", ten, "1.0 MB")
    yield Row("memory of the process tree with ten containers", "MB", whole[10], "60 MB")
    yield Row("with fifty", "MB", whole[50])


def bench_pull(bench: Bench) -> Iterator[Row]:
    for name, make in (("300 MB in few big files", big_files), ("20,000 small files", small_files)):
        repository = make.__name__.replace("_", "-")
        images.push(bench.registry, repository, "1", make())
        reference = f"{bench.registry}/{repository}:1"
        written: dict[str, list[float]] = {program: [] for program in bench.engines}

        def pull(engine: EngineProcess, reference: str = reference, written: dict[str, list[float]] = written) -> float:
            os.sync()
            before = bytes_written(engine.data_root)
            took = timed(engine, "pull", "-q", reference) / 1000
            os.sync()
            written[engine.program].append((bytes_written(engine.data_root) - before) / 2**20)
            engine.docker("rmi", reference)
            return took

        yield Row(f"pull of {name}", "s", bench.in_turns(pull, 3))
        yield Row(f"written to disk by pull of {name}", "MiB", written)


def bench_build(bench: Bench) -> Iterator[Row]:
    context = bench.directory / "build"
    context.mkdir()
    (context / "words").write_text("words\n")
    (context / "Dockerfile").write_text(
        f"FROM {bench.image}\nCOPY words /words\nRUN cat /words > /copy\nRUN mkdir /d && touch /d/f\nCMD cat /copy\n"
    )

    def build(engine: EngineProcess, *options: str) -> float:
        begun = time.perf_counter()
        engine.docker("build", "-q", *options, str(context), env={"DOCKER_BUILDKIT": "0"})
        return (time.perf_counter() - begun) * 1000

    for engine in bench.engines.values():
        build(engine)
    yield Row("build of five steps, no cache", "ms", bench.in_turns(lambda one: build(one, "--no-cache")), "0.5")
    yield Row("the same, all from the cache", "ms", bench.in_turns(build), "1.0")
    (context / "big").write_bytes(os.urandom(200 << 20))
    (context / "Dockerfile").write_text(f"FROM {bench.image}\nCOPY big /\nRUN test -s /big\n")
    peaks: dict[str, list[float]] = {program: [] for program in bench.engines}
    took: dict[str, list[float]] = {program: [] for program in bench.engines}
    for program, engine in bench.engines.items():
        with peak_memory(engine) as peak:
            took[program].append(build(engine, "--no-cache"))
        peaks[program].append(max(peak))
    yield Row("build with a context of 200 MB", "ms", took)
    yield Row("memory of the process tree (PSS) at its highest meanwhile", "MB", peaks, "120 MB")
    for engine in bench.engines.values():
        engine.docker("image", "prune", "-f")


@contextlib.contextmanager
def peak_memory(engine: EngineProcess) -> Iterator[list[float]]:
    """What was in use at many instants of the block."""
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(proportional_memory(engine))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


LOG_LINES = 200_000
LINE = "a line of ninety-nine characters as programs write them when nobody has told them to be more quiet."
WRITE = ["sh", "-c", f"yes '{LINE}' | head -n {LOG_LINES}"]


def bench_logs(bench: Bench) -> Iterator[Row]:
    """20 MB: from the start of the container to its exit, and reading them back from a log that holds them all."""

    def write(engine: EngineProcess) -> float:
        engine.docker("rm", "-f", "writer", check=False)
        options = ["--network", "none", "--log-driver", "json-file", "--log-opt", "max-size=64m"]
        begun = time.perf_counter()
        engine.docker("run", "-d", "--name", "writer", *options, bench.image, *WRITE)
        engine.docker("wait", "writer")
        return time.perf_counter() - begun

    def read(engine: EngineProcess) -> float:
        begun = time.perf_counter()
        with engine.docker_process("logs", "writer") as reader:
            assert reader.stdout is not None
            size = 0
            while data := reader.stdout.read(1 << 20):
                size += len(data)
        assert size == LOG_LINES * (len(LINE) + 1), size
        return time.perf_counter() - begun

    rounds = max(3, bench.rounds // 3)
    yield Row("200,000 lines (20 MB) of output: to the exit", "s", bench.in_turns(write, rounds, PROGRAMS), "1.0")
    yield Row("reading them back", "s", bench.in_turns(read, rounds, PROGRAMS), "1.0")
    for engine in bench.everyone.values():
        engine.remove_containers()


def bench_flash(bench: Bench) -> Iterator[Row]:
    """What the daemon gives to block devices for each byte of log (podman's conmon writes itself and then ends)."""
    for size, what in (("1m", "a log of 1 MiB"), ("64m", "a log that holds it all")):

        def write(engine: EngineProcess, size: str = size) -> float:
            before = _given_to_disk(engine.pid)
            options = ["--network", "none", "--log-driver", "json-file", "--log-opt", f"max-size={size}"]
            engine.docker("run", "-d", "--name", "writer", *options, bench.image, *WRITE)
            engine.docker("wait", "writer")
            time.sleep(10)  # until it is durable
            spent = _given_to_disk(engine.pid) - before
            engine.docker("rm", "-f", "writer")
            return spent / (LOG_LINES * (len(LINE) + 1))

        yield Row(f"bytes to flash for each byte of 20 MB, {what}", "", bench.in_turns(write, 3, BRIDGED), "1.1")


def _given_to_disk(pid: int) -> int:
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["write_bytes"])


def bench_parallel(bench: Bench) -> Iterator[Row]:
    def run(engine: EngineProcess, count: int, *options: str) -> float:
        begun = time.perf_counter()
        command = [*engine.cli, "run", *options, bench.image, "true"]
        running = [
            subprocess.Popen(command, env=engine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for _ in range(count)
        ]
        words = {process.communicate()[1] for process in running}
        took = time.perf_counter() - begun
        if failed := sum(process.returncode != 0 for process in running):
            print(f"{engine.program}: {failed} of {count} parallel runs failed: {words}", file=sys.stderr)
        return took

    def peak(engine: EngineProcess) -> float:
        """The most of memory while twenty run; looked at twice a second, apart from the times above."""
        found = [proportional_memory(engine)]
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(run, engine, 20, "--rm", "--network", "none")
            while not working.done():
                found.append(proportional_memory(engine))
                time.sleep(0.3)
        return max(found)

    rounds = max(3, bench.rounds // 3)
    for network, programs in (("none", PROGRAMS), ("bridge", BRIDGED)):
        options = ("--rm", "--network", network)
        values = bench.in_turns(lambda one, o=options: run(one, 20, *o), rounds, programs)
        yield Row(f"20 parallel run --rm true, network {network}", "s", values, "0.6")
    yield Row("most memory during 20 parallel runs", "MB", bench.in_turns(peak, 3), "150 MB")
    options = ("-d", "--network", "none")
    yield Row("50 parallel run -d", "s", bench.in_turns(lambda one: run(one, 50, *options), 3, PROGRAMS))
    for engine in bench.everyone.values():
        engine.remove_containers()


def bench_pings(bench: Bench) -> Iterator[Row]:
    """200 pings over 20 connections at once."""

    def ten(engine: EngineProcess) -> None:
        with contextlib.closing(UnixHTTPConnection(str(engine.socket), 30)) as connection:
            for _ in range(10):
                connection.request("GET", "/_ping")
                assert connection.getresponse().read() == b"OK"

    def many(engine: EngineProcess) -> float:
        begun = time.perf_counter()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(ten, [engine] * 20))
        return (time.perf_counter() - begun) * 1000

    yield Row("200 pings over 20 connections", "ms", bench.in_turns(many), "250 ms")


def bytes_written(directory: Path) -> float:
    """What the block device under `directory` has written since boot, by everybody."""
    device = os.stat(directory).st_dev
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
        return float(fields[6]) * 512
    return 0.0


BENCHES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "run": bench_run,
    "published": bench_published,
    "exec": bench_exec,
    "stop": bench_stop,
    "ps": bench_ps,
    "api": bench_api,
    "start": bench_start,
    "memory": bench_memory,
    "pull": bench_pull,
    "build": bench_build,
    "logs": bench_logs,
    "flash": bench_flash,
    "parallel": bench_parallel,
    "pings": bench_pings,
}


def table(rows: list[Row]) -> str:
    head = ["what", *(f"{program} (median)" for program in PROGRAMS), "ratio", "bar", "least-most"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHES)} (all)")
    parser.add_argument("--rounds", type=int, default=15, help="how often each command runs (15)")
    parser.add_argument("--only", choices=PROGRAMS, help="one engine alone")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    programs = [program for program in PROGRAMS if options.only in (None, program)]
    for program, package in (("dockerd", "docker.io"), ("podman", "podman")):
        if program in programs and shutil.which(program) is None:
            print(f"no {program} here to compare with (Debian package {package})", file=sys.stderr)
            programs.remove(program)
    os.environ["ENGINE_RUN_DIRECTORY"] = "/dev/shm"
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench", ignore_cleanup_errors=True)))
        claim(str(directory))
        registry = stack.enter_context(running_registry(directory / "registry"))
        images.push(registry, "busybox", "1", images.busybox_image())
        image = f"{registry}/busybox:1"
        engines = {
            program: stack.enter_context(running_engine(directory / program, program=program)) for program in programs
        }
        for engine in engines.values():
            engine.docker("pull", "-q", image)
        peers = {program: engine for program, engine in engines.items() if program in BRIDGED}
        bench = Bench(peers, engines, image, registry, directory, options.rounds)
        random.seed(1)
        for name in options.names or BENCHES:
            for row in BENCHES[name](bench):
                rows.append(row)
                print(" ".join(row.cells()[:4]), file=sys.stderr, flush=True)
    processor = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{platform.machine()}, {processor} processors, Linux {platform.release()}\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
