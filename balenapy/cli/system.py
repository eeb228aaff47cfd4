"""info, version, df, events."""

from __future__ import annotations

import argparse
import json
import re
import time
from datetime import datetime
from typing import Any

from balenapy.cli.client import Client, ClientError
from balenapy.cli.format import age, ellipsis, human_size, short_id, table
from balenapy.cli.images import parse_filters, parse_time
from balenapy.version import API_VERSION, ENGINE_VERSION


def add_verbs(verbs: Any) -> None:
    for name, run, text in (
        ("info", run_info, "what the engine says of itself"),
        ("version", run_version, "versions of client and engine"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(run=run)

    df = verbs.add_parser("df", help="disk usage")
    df.add_argument("-v", "--verbose", action="store_true")
    df.set_defaults(run=run_df)
    system = verbs.add_parser("system", help="df, info, events").add_subparsers(dest="what", required=True)
    df = system.add_parser("df")
    df.add_argument("-v", "--verbose", action="store_true")
    df.set_defaults(run=run_df)
    system.add_parser("info").set_defaults(run=run_info)

    for group in (verbs, system):
        events = group.add_parser("events", help="what happens, as it happens")
        events.add_argument("-f", "--filter", action="append", default=[])
        events.add_argument("--since", default="")
        events.add_argument("--until", default="")
        events.add_argument("--json", action="store_true", help="one JSON object a line")
        events.set_defaults(run=run_events)


def run_version(client: Client, options: argparse.Namespace) -> int:
    print(f"Client:\n Version:           {ENGINE_VERSION}\n API version:       {API_VERSION}\n")
    found = client.call("GET", "/version")
    print(
        f"Server: {found.get('Engine', '')}\n Engine:\n"
        f"  Version:          {found['Version']}\n"
        f"  API version:      {found['ApiVersion']} (minimum version {found['MinAPIVersion']})\n"
        f"  OS/Arch:          {found['Os']}/{found['Arch']}\n"
        f"  Kernel:           {found['KernelVersion']}"
    )
    return 0


def run_info(client: Client, options: argparse.Namespace) -> int:
    found = client.call("GET", "/info", {"memory": True})
    memory = found.get("Memory") or {}
    lines = [
        ("Containers", found["Containers"]),
        (" Running", found["ContainersRunning"]),
        (" Paused", found["ContainersPaused"]),
        (" Stopped", found["ContainersStopped"]),
        ("Images", found["Images"]),
        ("Server Version", found["ServerVersion"]),
        ("Storage Driver", found["Driver"]),
        *((f" {key}", value) for key, value in found["DriverStatus"] or []),
        ("Logging Driver", found["LoggingDriver"]),
        ("Cgroup Driver", found["CgroupDriver"]),
        ("Runtimes", " ".join(sorted(found["Runtimes"]))),
        ("Default Runtime", found["DefaultRuntime"]),
        ("Security Options", " ".join(found["SecurityOptions"] or [])),
        ("Kernel Version", found["KernelVersion"]),
        ("Operating System", found["OperatingSystem"]),
        ("OSType", found["OSType"]),
        ("Architecture", found["Architecture"]),
        ("CPUs", found["NCPU"]),
        ("Total Memory", f"{found['MemTotal'] / 2**30:.4g}GiB"),
        ("Name", found["Name"]),
        ("ID", found["ID"]),
        ("Docker Root Dir", found["DockerRootDir"]),
        ("Debug Mode", str(found["Debug"]).lower()),
        ("Experimental", str(found["ExperimentalBuild"]).lower()),
        ("Live Restore Enabled", str(found["LiveRestoreEnabled"]).lower()),
        *((f"Engine {name}", human_size(memory[key])) for name, key in _MEMORY if key in memory),
    ]
    for key, value in lines:
        print(f"{key}: {value}")
    for warning in found["Warnings"] or []:
        print(warning)
    return 0


_MEMORY = (("Memory (PSS)", "Pss"), ("Memory Peak", "PeakRss"), ("Memory Budget", "Budget"))


def run_df(client: Client, options: argparse.Namespace) -> int:
    if options.verbose:
        return _run_df_verbose(client)
    found = client.call("GET", "/system/df")
    images, containers, volumes = found["Images"] or [], found["Containers"] or [], found["Volumes"] or []
    caches = found["BuildCache"] or []

    def row(name: str, total: int, active: int, size: int, free: int) -> list[str]:
        share = f" ({100 * free // size}%)" if size else ""
        return [name, str(total), str(active), human_size(size), human_size(free) + share]

    used = sum(image["Size"] - max(0, image["SharedSize"]) for image in images if not image["Containers"])
    stopped = sum(one.get("SizeRw", 0) for one in containers if one["State"] not in ("running", "paused", "restarting"))
    idle = sum(one["UsageData"]["Size"] for one in volumes if not one["UsageData"]["RefCount"])
    rows = [
        row("Images", len(images), sum(1 for one in images if one["Containers"] > 0), found["LayersSize"], used),
        row(
            "Containers",
            len(containers),
            sum(1 for one in containers if one["State"] in ("running", "paused", "restarting")),
            sum(one.get("SizeRw", 0) for one in containers),
            stopped,
        ),
        row(
            "Local Volumes",
            len(volumes),
            sum(1 for one in volumes if one["UsageData"]["RefCount"]),
            sum(one["UsageData"]["Size"] for one in volumes),
            idle,
        ),
        row("Build Cache", len(caches), 0, found.get("BuilderSize", 0), found.get("BuilderSize", 0)),
    ]
    print(table(["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], rows))
    return 0


def _run_df_verbose(client: Client) -> int:
    """Each image, container and volume, and what the data root takes. Source: docker/cli formatter/disk_usage.go."""
    found = client.call("GET", "/system/df", {"disk": True})
    rows = []
    for one in found["Images"] or []:
        names = one["RepoTags"] or [f"{digest.partition('@')[0]}:<none>" for digest in one["RepoDigests"] or []]
        repository, _, tag = (names[0] if names else "<none>:<none>").rpartition(":")
        shared = max(0, one["SharedSize"])
        sizes = [human_size(size, 4) for size in (one["Size"], shared, one["Size"] - shared)]
        rows.append([repository, tag, short_id(one["Id"]), age(one["Created"]), *sizes, str(max(0, one["Containers"]))])
    header = ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE", "SHARED SIZE", "UNIQUE SIZE", "CONTAINERS"]
    print(f"Images space usage:\n\n{table(header, rows)}\n")
    rows = [
        [
            short_id(one["Id"]),
            one["Image"] if not one["Image"].startswith("sha256:") else short_id(one["Image"]),
            f'"{ellipsis(one["Command"], 20)}"',
            str(sum(mount.get("Driver") == "local" for mount in one["Mounts"])),
            human_size(one.get("SizeRw", 0), 3),
            age(one["Created"]),
            one["Status"],
            ",".join(name.lstrip("/") for name in one["Names"]),
        ]
        for one in found["Containers"] or []
    ]
    header = ["CONTAINER ID", "IMAGE", "COMMAND", "LOCAL VOLUMES", "SIZE", "CREATED", "STATUS", "NAMES"]
    print(f"Containers space usage:\n\n{table(header, rows)}\n")
    rows = [
        [one["Name"], str(one["UsageData"]["RefCount"]), human_size(one["UsageData"]["Size"])]
        for one in found["Volumes"] or []
    ]
    print(f"Local Volumes space usage:\n\n{table(['VOLUME NAME', 'LINKS', 'SIZE'], rows)}\n")
    ingests = found.get("Ingests") or []
    rows = [[one["Digest"], human_size(one["Size"]), human_size(one["TotalSize"])] for one in ingests]
    if rows:
        print(f"Unfinished downloads:\n\n{table(['DIGEST', 'HERE', 'OF'], rows)}\n")
    rows = [[name, human_size(size)] for name, size in found["Disk"].items()]
    print(f"On disk:\n\n{table(['WHAT', 'SIZE'], [*rows, ['All', human_size(sum(found['Disk'].values()))]])}")
    return 0


def parse_moment(text: str) -> str:
    """RFC 3339, unix seconds or a duration back from now (`10m`) -> the API's seconds.

    Raises: ClientError.
    """
    if not text or re.fullmatch(r"\d+(\.\d+)?", text):
        return text
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        factor = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
        return f"{time.time() - sum(float(number) * factor[unit] for number, unit in parts):.9f}"
    try:
        return f"{parse_time(text):.9f}"
    except ValueError as error:
        raise ClientError(f"failed to parse value as time or duration: {text!r}") from error


def run_events(client: Client, options: argparse.Namespace) -> int:
    query: dict[str, Any] = {"filters": parse_filters(options.filter)}
    query |= {key: parse_moment(value) for key, value in (("since", options.since), ("until", options.until)) if value}
    for event in client.request("GET", "/events", query).objects():
        if options.json:
            print(json.dumps(event), flush=True)
            continue
        moment = datetime.fromtimestamp(event["timeNano"] / 1e9).astimezone().isoformat(timespec="microseconds")
        attributes = ", ".join(f"{key}={value}" for key, value in sorted(event["Actor"]["Attributes"].items()))
        what = f"{moment} {event['Type']} {event['Action']} {event['Actor']['ID']}"
        print(f"{what} ({attributes})" if attributes else what, flush=True)
    return 0
