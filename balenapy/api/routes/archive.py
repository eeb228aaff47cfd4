"""Files of a container, as `docker cp` moves them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import App, Request, route
from balenapy.api.response import BodyWriter, Response, StreamResponse, empty_response, stream_response
from balenapy.core.containerpath import PathStat
from balenapy.core.wire import rfc3339nano
from balenapy.engine.archives import check_path, read_archive, stat_path, write_archive

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

STAT_HEADER = "X-Docker-Container-Path-Stat"
CODINGS = ("gzip", "deflate")
EPOCH = "1970-01-01T00:00:00Z"


def register(app: App, engine: Engine) -> None:
    async def look(request: Request, name: str) -> Response:
        stat = await stat_path(engine, name, request.args.get("path", ""))
        return empty_response(200, {STAT_HEADER: stat_header(stat)})

    async def read(request: Request, name: str) -> StreamResponse:
        path = request.args.get("path", "")
        check_path(path)
        coding = choose_coding(request.headers.get("Accept-Encoding", ""))

        async def produce(write: BodyWriter) -> None:
            def begin(stat: PathStat) -> None:
                answer.headers[STAT_HEADER] = stat_header(stat)
                if coding:
                    answer.headers["Content-Encoding"] = coding

            await read_archive(engine, name, path, coding, begin, write)

        answer = stream_response(produce, "application/x-tar", head_first=False)
        return answer

    async def write(request: Request, name: str) -> Response:
        await write_archive(
            engine,
            name,
            request.args.get("path", ""),
            request.body,
            keep_types=query.boolean(request.args, "noOverwriteDirNonDir"),
            give_to_user=query.boolean(request.args, "copyUIDGID"),
        )
        return empty_response(200)

    route(app, "HEAD", "/containers/<path:name>/archive", look)
    route(app, "GET", "/containers/<path:name>/archive", read)
    route(app, "PUT", "/containers/<path:name>/archive", write)


def stat_header(told: PathStat) -> str:
    value = {
        "name": told.name,
        "size": told.size,
        "mode": told.mode,
        "mtime": rfc3339nano(told.mtime_ns) if told.mtime_ns else EPOCH,
        "linkTarget": told.link_target,
    }
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(text.encode(errors="replace")).decode()


def choose_coding(accepted: str, offers: Sequence[str] = CODINGS) -> str:
    """What of `gzip`, `deflate` an Accept-Encoding wants most; "" for neither.

    Source: gddo httputil NegotiateContentEncoding, which moby uses: the first offer wins a tie.
    """
    best, best_weight = "", -1.0
    wanted = [_parse_coding(text) for text in accepted.split(",") if text.strip()]
    for offer in offers:
        for coding, weight in wanted:
            if weight > best_weight and coding in ("*", offer):
                best, best_weight = offer, weight
    return best if best_weight > 0 else ""


def _parse_coding(text: str) -> tuple[str, float]:
    coding, _, parameters = text.partition(";")
    key, _, value = parameters.strip().partition("=")
    if key.strip().lower() != "q":
        return coding.strip().lower(), 1.0
    try:
        return coding.strip().lower(), float(value)
    except ValueError:
        return coding.strip().lower(), 0.0
