"""pull, images, rmi, tag, history."""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from datetime import datetime
from typing import Any

from balenapy.cli.client import Client, ClientError, EngineAnswer
from balenapy.cli.format import age, ellipsis, human_size, moment, print_rows, short_id, table
from balenapy.core.reference import parse_reference


def add_verbs(verbs: Any) -> None:
    pull = verbs.add_parser("pull", help="pull an image from a registry")
    pull.add_argument("-a", "--all-tags", action="store_true")
    pull.add_argument("-q", "--quiet", action="store_true")
    pull.add_argument("--platform", default="")
    pull.add_argument("image")
    pull.set_defaults(run=run_pull)

    images = verbs.add_parser("images", help="list images")
    images.add_argument("-a", "--all", action="store_true")
    images.add_argument("-q", "--quiet", action="store_true")
    images.add_argument("-f", "--filter", action="append", default=[])
    images.add_argument("--no-trunc", action="store_true")
    images.add_argument("--digests", action="store_true")
    images.add_argument("--format", default="")
    images.add_argument("repository", nargs="?")
    images.set_defaults(run=run_images)

    rmi = verbs.add_parser("rmi", help="remove images")
    rmi.add_argument("-f", "--force", action="store_true")
    rmi.add_argument("--no-prune", action="store_true")
    rmi.add_argument("image", nargs="+")
    rmi.set_defaults(run=run_rmi)

    tag = verbs.add_parser("tag", help="give an image another reference")
    tag.add_argument("image")
    tag.add_argument("reference")
    tag.set_defaults(run=run_tag)

    fsck = verbs.add_parser("fsck", help="verify the files of images, and mend them")
    fsck.add_argument("--deep", action="store_true", help="read from the medium; check layers' digests")
    fsck.add_argument("--repair", action="store_true", help="fetch what is damaged from its registry again")
    fsck.add_argument("image", nargs="*", help="all layers, if none is named")
    fsck.set_defaults(run=run_fsck)

    history = verbs.add_parser("history", help="show the layers of an image")
    history.add_argument("-q", "--quiet", action="store_true")
    history.add_argument("--no-trunc", action="store_true")
    history.add_argument("image")
    history.set_defaults(run=run_history)


def parse_filters(given: list[str]) -> dict[str, dict[str, bool]]:
    """`-f key=value` -> what the API takes.

    Raises: ClientError.
    """
    found: dict[str, dict[str, bool]] = {}
    for one in given:
        key, separator, value = one.partition("=")
        if not separator:
            raise ClientError(f"bad format of filter {one!r} (expected name=value)")
        found.setdefault(key.strip().lower(), {})[value.strip()] = True
    return found


def split_reference(reference: str) -> tuple[str, str]:
    """`repo:tag` or `repo@digest` -> (repository, tag or digest); no tag means latest."""
    name, separator, digest = reference.partition("@")
    if separator:
        return name, digest
    head, separator, tag = reference.rpartition(":")
    return (head, tag) if separator and "/" not in tag else (reference, "latest")


def registry_auth(reference: str) -> str:
    """The X-Registry-Auth header from docker's config.json for the registry of `reference`; "" when there is none."""
    first = reference.partition("/")[0]
    is_host = "/" in reference and ("." in first or ":" in first or first == "localhost")
    server = first if is_host else "https://index.docker.io/v1/"
    for directory in (os.environ.get("DOCKER_CONFIG"), "~/.balena-engine", "~/.docker"):
        if not directory:
            continue
        try:
            with open(os.path.join(os.path.expanduser(directory), "config.json")) as file:
                entry = json.load(file).get("auths", {}).get(server)
        except (OSError, ValueError, AttributeError):
            continue
        if entry and entry.get("auth"):
            user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            answer = {"username": user, "password": password, "serveraddress": server}
            if entry.get("identitytoken"):
                answer["identitytoken"] = entry["identitytoken"]
            return base64.urlsafe_b64encode(json.dumps(answer).encode()).decode()
    return ""


class ProgressLines:
    """Draws a JSON progress stream: one line per id, redrawn in place on a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._rows: dict[str, int] = {}
        self._terminal = sys.stdout.isatty()
        self._quiet = quiet
        self._said: dict[str, str] = {}

    def show(self, line: dict[str, Any]) -> None:
        """Print one object of the stream.

        Raises: ClientError for an error line.
        """
        if "errorDetail" in line or "error" in line:
            raise ClientError((line.get("errorDetail") or {}).get("message") or line.get("error"))
        if self._quiet or "aux" in line:
            return
        identifier, status = line.get("id", ""), line.get("status", "")
        text = line.get("stream", "").rstrip("\n") or status
        bar = line.get("progress", "")
        if identifier == "Total" and not status:
            if not self._terminal:
                return
            text = "Total"
        if not identifier or text.startswith("Pulling from"):
            print(f"{identifier}: {text}" if identifier else text)
            self._rows = {key: row + 1 for key, row in self._rows.items()}
            return
        if not self._terminal:
            if self._said.get(identifier) != text:
                self._said[identifier] = text
                print(f"{identifier}: {text}")
            return
        if identifier not in self._rows:
            print()
            self._rows = {key: row + 1 for key, row in self._rows.items()} | {identifier: 1}
        up = self._rows[identifier]
        print(f"\x1b[{up}A\r\x1b[2K{identifier}: {text} {bar}\x1b[{up}B\r", end="", flush=True)


def run_pull(client: Client, options: argparse.Namespace) -> int:
    return pull(client, options.image, all_tags=options.all_tags, quiet=options.quiet, platform=options.platform)


def pull(client: Client, reference: str, *, all_tags: bool = False, quiet: bool = False, platform: str = "") -> int:
    """Pull `reference`, drawing its progress.

    Raises: ClientError.
    """
    name, tag = split_reference(reference)
    if not all_tags and not quiet and name == reference:
        print(f"Using default tag: {tag}")
    query = {"fromImage": name} | ({} if all_tags else {"tag": tag}) | ({"platform": platform} if platform else {})
    auth = registry_auth(reference)
    response = client.request("POST", "/images/create", query, headers={"X-Registry-Auth": auth} if auth else None)
    lines = ProgressLines(quiet)
    for line in response.objects():
        lines.show(line)
    parsed = parse_reference(reference)
    print(parsed.name if all_tags else parsed.with_default_tag().canonical())
    return 0


def run_images(client: Client, options: argparse.Namespace) -> int:
    filters = parse_filters(options.filter)
    if options.repository:
        filters.setdefault("reference", {})[options.repository] = True
    found = client.call("GET", "/images/json", {"all": options.all, "filters": filters})
    rows = []
    for image in found:
        identifier = image["Id"] if options.no_trunc else short_id(image["Id"])
        digests = dict(one.split("@", 1) for one in image["RepoDigests"] or [])
        for tagged in image["RepoTags"] or [f"{name}:<none>" for name in digests] or ["<none>:<none>"]:
            if options.quiet:
                print(identifier)
                continue
            repository, _, tag = tagged.rpartition(":")
            rows.append({
                "Repository": repository,
                "Tag": tag,
                "Digest": digests.get(repository, "<none>"),
                "ID": identifier,
                "CreatedSince": age(image["Created"]),
                "CreatedAt": moment(image["Created"]),
                "Size": human_size(image["Size"], 3),
            })  # fmt: skip
    columns = ["Repository", "Tag", *(["Digest"] if options.digests else []), "ID", "CreatedSince", "Size"]
    if not options.quiet:
        print_rows(rows, columns, {"ID": "IMAGE ID", "CreatedSince": "CREATED"}, options.format)
    return 0


def run_rmi(client: Client, options: argparse.Namespace) -> int:
    code = 0
    for name in options.image:
        try:
            for line in client.call("DELETE", f"/images/{name}", {"force": options.force, "noprune": options.no_prune}):
                for verb, what in line.items():
                    print(f"{verb}: {what}")
        except EngineAnswer as error:
            print(error, file=sys.stderr)
            code = 1
    return code


def run_tag(client: Client, options: argparse.Namespace) -> int:
    repository, tag = split_reference(options.reference)
    client.call("POST", f"/images/{options.image}/tag", {"repo": repository, "tag": tag})
    return 0


def run_fsck(client: Client, options: argparse.Namespace) -> int:
    """0: everything is whole, by now; 1: something is not."""
    query = {"name": options.image, "deep": options.deep, "repair": options.repair}
    auth = registry_auth(options.image[0]) if options.image else ""
    response = client.request("POST", "/images/fsck", query, headers={"X-Registry-Auth": auth} if auth else None)
    for line in response.objects():
        if "error" in line:
            raise ClientError(line["error"])
        for bad in line.get("Bad") or ():
            path = f" /{bad['Path']}" if bad["Path"] else ""
            print(f"{line['Layer'][:19]}{path}: {bad['Why']}")
        if "Image" in line:
            print(f"{line['Image'][:19]}: {'repaired' if line['Repaired'] else line['Why']}")
        if "Layers" in line:
            found = f"{line['Layers']} layers, {line['Files']} files, {human_size(line['Bytes'])} read"
            print(f"{found}: {line['Damaged'] or 'nothing'} damaged")
            return int(bool(line["Damaged"]))
    raise ClientError("the engine did not finish")


def run_history(client: Client, options: argparse.Namespace) -> int:
    found = client.call("GET", f"/images/{options.image}/history")
    if options.quiet:
        for one in found:
            print(one["Id"] if options.no_trunc else short_id(one["Id"]))
        return 0
    rows = []
    for one in found:
        created_by = one["CreatedBy"].replace("\t", " ")
        rows.append([
            one["Id"] if options.no_trunc or one["Id"] == "<missing>" else short_id(one["Id"]),
            age(one["Created"]),
            created_by if options.no_trunc else ellipsis(created_by, 45),
            human_size(one["Size"], 3),
            one["Comment"],
        ])  # fmt: skip
    print(table(["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"], rows))
    return 0


def parse_time(text: str) -> float:
    """An API time -> seconds since 1970."""
    head, _, fraction = text.rstrip("Z").partition(".")
    whole = datetime.fromisoformat(head[:19] + "+00:00").timestamp()
    return whole + float(f"0.{fraction}" if fraction.isdigit() else 0)
