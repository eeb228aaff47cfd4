"""Before and around a handler: paths, versions, headers, errors, bodies. Exact, as clients see them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy import version
from balenapy.api.app import Answer, App, Request, clean_path, json_body, route
from balenapy.api.errors import STATUS, status_of
from balenapy.api.response import BodyWriter, Response, empty_response, json_response, stream_response, text_response
from balenapy.core.container import LogConfig
from balenapy.errors import EngineError, NotFound, NotModified, SystemFailure
from tests.api.connection import client_of, connected, request_bytes, served
from tests.trio_tests import trio_test

ENGINE_NAMES = ["Api-Version", "Docker-Experimental", "Ostype", "Server"]


def application(**options: object) -> App:
    app = App(**options)  # type: ignore[arg-type]

    async def ping(request: Request) -> Answer:
        return text_response("OK")

    async def head_ping(request: Request) -> Answer:
        return Response(sniffed_type="text/plain; charset=utf-8")

    async def show(request: Request, name: str) -> Answer:
        return json_response({"name": name, "args": request.args.to_dict(flat=False), "v": request.api_version})

    async def body(request: Request) -> Answer:
        return json_response(await json_body(request))

    async def typed(request: Request) -> Answer:
        config = await json_body(request, LogConfig, refuse=SystemFailure)
        return json_response(None if config is None else config.type)

    async def nothing(request: Request) -> Answer:
        return empty_response(204)

    async def logs(request: Request) -> Answer:
        async def produce(write: BodyWriter) -> None:
            await trio.sleep(100)
            await write(b"line")

        return stream_response(produce)

    async def pull(request: Request) -> Answer:
        async def produce(write: BodyWriter) -> None:
            if request.args.get("fail") == "before":
                raise NotFound("manifest unknown")
            await write(b"one\n")
            if request.args.get("fail") == "after":
                raise NotFound("too late")
            await write(b"two\n")

        return stream_response(produce, "application/json", head_first=False)

    route(app, "GET", "/_ping", ping)
    route(app, "HEAD", "/_ping", head_ping)
    route(app, "GET", "/things/<path:name>/json", show)
    route(app, "POST", "/body", body)
    route(app, "POST", "/typed", typed)
    route(app, "POST", "/nothing", nothing)
    route(app, "POST", "/form", lambda request: show(request, "form"))
    route(app, "GET", "/logs", logs)
    route(app, "POST", "/pull", pull)
    return app


async def head_of(app: App, method: str, target: str) -> list[str]:
    async with connected(app) as client:
        await client.send(request_bytes(method, target))
        head = await client.head()
        return [f"HTTP/1.1 {head.status} {head.reason}", *head.names]


def names(lines: list[str]) -> list[str]:
    """The fixture's head: field names; ours has no cache headers, and Date is everywhere."""
    fields = [line.partition(":")[0] for line in lines]
    return [field for field in fields if field not in ("Cache-Control", "Pragma")]


@pytest.mark.parametrize(
    ("recorded", "method", "target"),
    [("ping", "GET", "/v1.39/_ping"), ("json_answer", "GET", "/things/x/json"), ("page_not_found", "GET", "/nowhere")],
)
@trio_test(autojump=True)
async def test_heads_are_the_reference_engines(
    recorded: str, method: str, target: str, http_heads: dict[str, list[str]]
) -> None:
    head = await head_of(application(), method, target)
    expected = names(http_heads[recorded])
    if "Content-Length" not in expected:
        head.remove("Content-Length")
    head.remove("Date")
    assert head == expected


@trio_test(autojump=True)
async def test_stream_head_comes_before_the_first_byte(http_heads: dict[str, list[str]]) -> None:
    before = trio.current_time()
    head = await head_of(application(), "GET", "/logs")
    head.remove("Date")
    assert head == names(http_heads["logs"])
    assert trio.current_time() == before


@trio_test(autojump=True)
async def test_engine_headers() -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", "/_ping")
    assert answer.headers["Api-Version"] == "1.39"
    assert answer.headers["Docker-Experimental"] == "false"
    assert answer.headers["Ostype"] == "linux"
    assert answer.headers["Server"] == f"Docker/{version.ENGINE_VERSION} (linux)"


@trio_test(autojump=True)
async def test_experimental_and_cors() -> None:
    async with connected(application(experimental=True, cors="*")) as client:
        answer = await client.request("GET", "/_ping")
        assert answer.headers["Docker-Experimental"] == "true"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Access-Control-Allow-Methods"] == "HEAD, GET, POST, DELETE, PUT, OPTIONS"
        missing = await client.request("GET", "/nowhere")
        assert missing.names == ["Content-Type", "Date", "Content-Length"]


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/nowhere"),
        ("GET", "/v1.39/nowhere"),
        ("GET", "/v9.99/nowhere"),
        ("DELETE", "/_ping"),
        ("HEAD", "/things/x/json"),
        ("GET", "/_ping/"),
        ("GET", "/things/json"),
        ("GET", "/v1.39"),
        ("GET", "/"),
        ("GET", "/v/_ping"),
        ("GET", "/v1a/_ping"),
    ],
)
@trio_test(autojump=True)
async def test_page_not_found(method: str, target: str) -> None:
    async with connected(application()) as client:
        answer = await client.request(method, target)
        assert (answer.status, answer.names) == (404, ["Content-Type", "Date", "Content-Length"])
        assert answer.headers["Content-Length"] == "29"
        if method != "HEAD":
            assert answer.body == b'{"message":"page not found"}\n'


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("//_ping", "/_ping"),
        ("/things//json?size=1", "/things/json?size=1"),
        ("/v1.39/./_ping", "/v1.39/_ping"),
        ("/a/../_ping/", "/_ping/"),
        ("/a%20b/../c%20d", "/c%20d"),
        ("/..", "/"),
    ],
)
@trio_test(autojump=True)
async def test_unclean_path_is_redirected(target: str, location: str) -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", target)
        assert (answer.status, answer.headers["Location"]) == (301, location)


@pytest.mark.parametrize(
    ("path", "clean"),
    [("/", "/"), ("", "/"), ("a", "/a"), ("/a/", "/a/"), ("/a/b/../../..", "/"), ("/.a", "/.a"), ("/a/..b", "/a/..b")],
)
def test_clean_path(path: str, clean: str) -> None:
    assert clean_path(path) == clean


@pytest.mark.parametrize(("asked", "plain"), [("1.11", True), ("1", True), ("1.9", True), ("0.0", True), (".", True)])
@trio_test(autojump=True)
async def test_too_old(asked: str, plain: bool) -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", f"/v{asked}/_ping")
    assert answer.status == 400
    assert answer.body.decode() == (
        f"client version {asked} is too old. Minimum supported API version is 1.12, "
        "please upgrade your client to a newer version\n"
    )
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Docker-Experimental" not in answer.headers
    assert answer.headers["Api-Version"] == "1.39"


@pytest.mark.parametrize("asked", ["1.40", "1.41", "2", "1.39.1", "9.9"])
@trio_test(autojump=True)
async def test_too_new(asked: str) -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", f"/v{asked}/_ping")
    assert answer.status == 400
    assert answer.json == {"message": f"client version {asked} is too new. Maximum supported API version is 1.39"}
    assert "Docker-Experimental" not in answer.headers


@trio_test(autojump=True)
async def test_a_raised_ceiling_is_announced_and_kept() -> None:
    async with connected(application(newest_version="1.44")) as client:
        served = await client.request("GET", "/v1.44/_ping")
        refused = await client.request("GET", "/v1.45/_ping")
    assert served.status == 200
    assert served.headers["Api-Version"] == "1.44"
    assert refused.status == 400
    assert refused.json == {"message": "client version 1.45 is too new. Maximum supported API version is 1.44"}


@pytest.mark.parametrize("asked", ["1.12", "1.24", "1.38", "1.39", "1.39.0"])
@trio_test(autojump=True)
async def test_versions_served(asked: str) -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", f"/v{asked}/things/a/json")
    assert (answer.status, answer.json["v"]) == (200, asked)


@trio_test(autojump=True)
async def test_old_clients_get_errors_as_text() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/v1.23/pull?fail=before")
        assert (answer.status, answer.body) == (404, b"manifest unknown\n")
        answer = await client.request("POST", "/v1.24/pull?fail=before")
        assert (answer.status, answer.json) == (404, {"message": "manifest unknown"})


@pytest.mark.parametrize("target", ["/anything", "/v1.39/anything", "/", "/_ping"])
@trio_test(autojump=True)
async def test_options_answers_for_any_path(target: str) -> None:
    async with connected(application()) as client:
        answer = await client.request("OPTIONS", target)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.names == [*ENGINE_NAMES, "Date", "Content-Length"]


@trio_test(autojump=True)
async def test_head_has_no_body() -> None:
    async with connected(application()) as client:
        answer = await client.request("HEAD", "/_ping")
        assert (answer.status, answer.headers["Content-Length"]) == (200, "0")
        assert (await client.request("GET", "/_ping")).body == b"OK"


@trio_test(autojump=True)
async def test_names_may_hold_slashes_and_escapes() -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", "/v1.39/things/host:5000/a/b%20c%2Fd:1@sha256:e/json?a=1&a=2&b&c=%2B+x")
    assert answer.json == {
        "name": "host:5000/a/b c/d:1@sha256:e",
        "args": {"a": ["1", "2"], "b": [""], "c": ["+ x"]},
        "v": "1.39",
    }


@trio_test(autojump=True)
async def test_no_content_has_no_length() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/nothing")
        assert (answer.status, answer.names) == (204, [*ENGINE_NAMES, "Date"])
        assert (await client.request("GET", "/_ping")).status == 200


@trio_test(autojump=True)
async def test_json_is_not_html_escaped() -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", "/things/%3Ca%26b%3E%E2%98%83/json")
    assert '"name":"<a&b>☃"'.encode() in answer.body
    assert answer.body.endswith(b"}\n")
    assert answer.headers["Content-Type"] == "application/json"


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "status"), STATUS)
@trio_test(autojump=True)
async def test_every_kind_has_its_status(kind: type[EngineError], status: int) -> None:
    app = application()

    async def fails(request: Request) -> Answer:
        raise kind("why <not>")

    route(app, "GET", "/fails", fails)
    async with connected(app) as client:
        answer = await client.request("GET", "/fails")
    assert answer.status == status
    if kind is NotModified:
        assert (answer.body, answer.names) == (b"", [*ENGINE_NAMES, "Date"])
    else:
        assert answer.body == b'{"message":"why <not>"}\n'
        assert "Api-Version" in answer.headers


def test_unclassified_errors_are_500() -> None:
    assert [status_of(EngineError("x")), status_of(ValueError("x"))] == [500, 500]


@trio_test(autojump=True)
async def test_a_bug_is_500_with_its_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = application()

    async def fails(request: Request) -> Answer:
        raise ZeroDivisionError("oops")

    route(app, "GET", "/fails", fails)
    with caplog.at_level(logging.ERROR):
        async with connected(app) as client:
            answer = await client.request("GET", "/fails")
            assert (await client.request("GET", "/_ping")).status == 200
    assert (answer.status, answer.json) == (500, {"message": "internal error: ZeroDivisionError: oops"})
    assert "Traceback" in caplog.text


@trio_test(autojump=True)
async def test_an_error_out_of_a_nursery_keeps_its_kind() -> None:
    app = application()

    async def fails(request: Request) -> Answer:
        async with trio.open_nursery():
            raise NotFound("No such container: x")

    route(app, "GET", "/fails", fails)
    async with connected(app) as client:
        answer = await client.request("GET", "/fails")
    assert (answer.status, answer.json) == (404, {"message": "No such container: x"})


# --- streams ----------------------------------------------------------------------------------------------------


@trio_test(autojump=True)
async def test_error_before_the_first_piece_is_an_error_answer() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/pull?fail=before")
        assert (answer.status, answer.json) == (404, {"message": "manifest unknown"})
        answer = await client.request("POST", "/pull")
        assert (answer.status, answer.body) == (200, b"one\ntwo\n")
        assert answer.headers["Content-Type"] == "application/json"


@trio_test(autojump=True)
async def test_error_after_the_first_piece_cuts_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with connected(application()) as client:
            await client.send(request_bytes("POST", "/pull?fail=after"))
            await client.head()
            assert await client.chunk() == b"one\n"
            assert await client.receive_to_end() == b""
    assert "too late" in caplog.text


@trio_test(autojump=True)
async def test_a_channel_can_be_streamed_and_is_closed() -> None:
    app = application()
    send, receive = trio.open_memory_channel[bytes](3)

    async def streams(request: Request) -> Answer:
        return stream_response(receive, "text/x")

    route(app, "GET", "/streams", streams)
    for piece in (b"a", b"b", b"c"):
        send.send_nowait(piece)
    send.close()
    async with connected(app) as client:
        assert (await client.request("GET", "/streams")).body == b"abc"
    with pytest.raises(trio.ClosedResourceError):
        receive.receive_nowait()


@trio_test(autojump=True)
async def test_http_1_0_and_connection_close_are_served_and_closed() -> None:
    for request in (
        b"GET /_ping HTTP/1.0\r\n\r\n",
        b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        async with connected(application()) as client:
            await client.send(request)
            assert (await client.receive_to_end()).endswith(b"\r\n\r\nOK")
    async with connected(application()) as client:
        await client.send(b"POST /pull HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        assert (await client.receive_to_end()).endswith(b"\r\n\r\none\ntwo\n")


@trio_test(autojump=True)
async def test_100_continue() -> None:
    async with connected(application()) as client:
        await client.send(
            request_bytes("POST", "/body", Expect="100-continue", Content_Type="application/json", Content_Length="2")
        )
        assert (await client.head()).status == 100
        await client.send(b"42")
        assert (await client.answer()).json == 42


# --- bodies -----------------------------------------------------------------------------------------------------

JSON = {"Content_Type": "application/json"}


@pytest.mark.parametrize(
    ("target", "body", "headers", "status", "expected"),
    [
        ("/body", b'{"a":1}', JSON, 200, {"a": 1}),
        ("/body", b'{"a":1}', {"Content_Type": "application/json; charset=utf-8"}, 200, {"a": 1}),
        ("/body", b"null", JSON, 200, None),
        ("/typed", b"null", JSON, 200, None),
        ("/typed", b'{"TYPE":"none","unknown":1}', JSON, 200, "none"),
        (
            "/body",
            b"{}",
            {"Content_Type": "text/plain"},
            400,
            "Content-Type specified (text/plain) must be 'application/json'",
        ),
        ("/body", b"{}", {}, 400, "Content-Type specified () must be 'application/json'"),
        ("/body", b"", {}, 400, "got EOF while reading request body"),
        ("/body", b"", JSON, 400, "got EOF while reading request body"),
        ("/body", b'{"a"', JSON, 400, "unexpected EOF"),
        ("/typed", b"", {}, 500, "EOF"),
        ("/typed", b"{", JSON, 500, "unexpected EOF"),
        ("/typed", b"x", JSON, 500, "invalid character 'x' looking for beginning of value"),
    ],
)
@trio_test(autojump=True)
async def test_json_bodies(target: str, body: bytes, headers: dict[str, str], status: int, expected: object) -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", target, body, **headers)
        got = answer.json["message"] if status != 200 else answer.json
        assert (answer.status, got) == (status, expected)
        assert (await client.request("GET", "/_ping")).status == 200


@trio_test(autojump=True)
async def test_wrong_type_is_told_in_gos_words() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/typed", b'{"Type":5}', **JSON)
    assert answer.status == 500
    assert answer.json["message"].startswith("json: cannot unmarshal number into Go struct field ")


@trio_test(autojump=True)
async def test_form_values_come_before_the_urls() -> None:
    async with connected(application()) as client:
        answer = await client.request(
            "POST", "/form?a=url&b=1", b"a=body", Content_Type="application/x-www-form-urlencoded"
        )
    assert answer.json["args"] == {"a": ["body", "url"], "b": ["1"]}


@trio_test
async def test_listener_replaces_a_stale_socket_but_not_a_live_one(tmp_path: Path) -> None:
    from balenapy.api import server

    async with served(application(), tmp_path) as path:
        assert (tmp_path / "engine.sock").stat().st_mode & 0o777 == 0o660
        with pytest.raises(SystemFailure, match="another process is listening"):
            server.unix_listener(path)
        async with client_of(path) as client:
            assert (await client.request("GET", "/_ping")).body == b"OK"
    assert not (tmp_path / "engine.sock").exists()
    stale = server.unix_listener(str(tmp_path / "engine.sock"))
    server.stop_accepting([stale])
    async with served(application(), tmp_path) as path, client_of(path) as client:
        assert (await client.request("GET", "/_ping")).body == b"OK"
    (tmp_path / "engine.sock").write_text("precious")
    with pytest.raises(SystemFailure, match="not a socket"):
        server.unix_listener(str(tmp_path / "engine.sock"))


@trio_test
async def test_stop_accepting_ends_idle_connections_and_finishes_busy_ones(tmp_path: Path) -> None:
    from balenapy.api import server

    app, go_on = application(), trio.Event()

    async def waits(request: Request) -> Answer:
        await go_on.wait()
        return json_response("done")

    route(app, "GET", "/waits", waits)
    listener = server.unix_listener(str(tmp_path / "engine.sock"))
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, app, [listener])
            async with client_of(listener.path) as idle, client_of(listener.path) as busy:
                await idle.request("GET", "/_ping")
                await busy.send(request_bytes("GET", "/waits"))
                await trio.sleep(0.02)
                server.close_listeners([listener])
                assert await idle.receive_to_end() == b""
                go_on.set()
                assert (await busy.answer()).json == "done"
                assert await busy.receive_to_end() == b""


@trio_test
async def test_pings_are_answered_while_the_engine_restores_and_the_rest_waits() -> None:
    app = application()
    app.ready = ready = trio.Event()
    async with connected(app) as waiting, connected(app) as quick, trio.open_nursery() as nursery:
        await waiting.send(request_bytes("GET", "/things/a/json"))
        await quick.send(request_bytes("GET", "/v1.39/_ping"))
        assert (await quick.head()).status == 200
        heads: list[int] = []

        async def take() -> None:
            heads.append((await waiting.head()).status)

        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert heads == []
        ready.set()
    assert heads == [200]
