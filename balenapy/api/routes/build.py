"""Build: `POST /build`, and what else of the builder clients ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from balenapy.api import query
from balenapy.api.app import Request, route
from balenapy.api.response import BodyWriter, Response, StreamResponse, empty_response, json_response, stream_response
from balenapy.core import progress, wire
from balenapy.core.container import HostConfig, Ulimit
from balenapy.core.manifest import parse_platform
from balenapy.engine.build import BuildRequest, check_tags
from balenapy.engine.buildsteps import CommandFailed
from balenapy.errors import EngineError, InvalidParameter, SystemFailure

if TYPE_CHECKING:
    from balenapy.api.app import App
    from balenapy.engine.engine import Engine

ISOLATIONS = ("", "default", "process", "hyperv")


def register(app: App, engine: Engine) -> None:
    async def build_image(request: Request) -> StreamResponse:
        asked = read_request(request, engine)

        async def produce(write: BodyWriter) -> None:
            try:
                await engine.builds.build(asked, request.body, write)
            except EngineError as error:
                if not write.started:
                    raise
                code = error.code if isinstance(error, CommandFailed) else 0
                await write(progress.error(error.message, code))

        return stream_response(produce, "application/json", head_first=False)

    async def prune(request: Request) -> Response:
        """The legacy builder's cache is its images: there is nothing else to prune."""
        query.filters(request.args)
        query.integer(request.args, "keep-storage")
        return json_response({"CachesDeleted": None, "SpaceReclaimed": 0})

    async def cancel(request: Request) -> Response:
        """Legacy builds end with their request: accept, and do nothing."""
        if not request.args.get("id"):
            raise SystemFailure("build ID not provided")
        return empty_response(200)

    route(app, "POST", "/build", build_image)
    route(app, "POST", "/build/prune", prune)
    route(app, "POST", "/build/cancel", cancel)


def read_request(request: Request, engine: Engine) -> BuildRequest:
    """The query and headers. Raises: InvalidParameter, SystemFailure."""
    args = request.args
    version = args.get("version", "")
    if version == "2":
        raise InvalidParameter("BuildKit is not supported by this daemon, use version=1")
    if version not in ("", "1"):
        raise SystemFailure(f'invalid version "{version}"')
    squash = query.boolean(args, "squash")
    if squash and not engine.config.experimental:
        raise InvalidParameter("squash is only supported with experimental mode")
    host_config = _host_config(request)
    platform = args.get("platform", "") if request.version_at_least("1.32") else ""
    if platform and parse_platform(platform, engine.pulls.platform).os != "linux":
        raise InvalidParameter("operating system is not supported")
    force_remove = query.boolean(args, "forcerm")
    return BuildRequest(
        tags=check_tags(args.getlist("t")),
        dockerfile=args.get("dockerfile") or "Dockerfile",
        remote=args.get("remote", ""),
        quiet=query.boolean(args, "q"),
        no_cache=query.boolean(args, "nocache"),
        pull=query.boolean(args, "pull"),
        remove=force_remove or args.get("rm", "") == "" or query.boolean(args, "rm"),
        force_remove=force_remove,
        squash=squash,
        target=args.get("target", ""),
        build_args=_strings(args.get("buildargs", ""), "error reading build args", nulls=True),
        labels=_strings(args.get("labels", ""), "error reading labels"),
        cache_from=_list(args.get("cachefrom", "")),
        platform=platform,
        host_config=host_config,
        registry_config=request.headers.get("X-Registry-Config", ""),
    )


def _host_config(request: Request) -> HostConfig:
    """What containers of RUN get."""
    args = request.args
    if args.get("securityopt"):
        raise InvalidParameter("The daemon on this platform does not support setting security options on build")
    isolation = args.get("isolation", "")
    if isolation.lower() not in ISOLATIONS:
        raise InvalidParameter(f'unsupported isolation: "{isolation}"')
    config = HostConfig(
        memory=_number(args.get("memory", "")),
        memory_swap=_number(args.get("memswap", "")),
        cpu_shares=_number(args.get("cpushares", "")),
        cpu_period=_number(args.get("cpuperiod", "")),
        cpu_quota=_number(args.get("cpuquota", "")),
        cpuset_cpus=args.get("cpusetcpus", ""),
        cpuset_mems=args.get("cpusetmems", ""),
        cgroup_parent=args.get("cgroupparent", ""),
        network_mode=args.get("networkmode", ""),
        extra_hosts=args.getlist("extrahosts") or None,
        binds=list(_list(args.get("volumes", ""))) or None,
        isolation=isolation,
    )
    shm_size = args.get("shmsize", "")
    if shm_size:
        try:
            config.shm_size = int(shm_size)
        except ValueError:
            raise SystemFailure(f'strconv.ParseInt: parsing "{shm_size}": invalid syntax') from None
    what = "error reading ulimit settings"
    ulimits = _json(args.get("ulimits", ""), what, InvalidParameter)
    if ulimits is None:
        return config
    if not isinstance(ulimits, list):
        kind = wire.kind_of(ulimits)
        raise InvalidParameter(f"{what}: json: cannot unmarshal {kind} into Go value of type []*units.Ulimit")
    try:
        config.ulimits = [wire.decode(Ulimit, entry) for entry in ulimits]
    except wire.MalformedJSON as error:
        raise InvalidParameter(f"{what}: {error.message}") from error
    return config


def _number(text: str) -> int:
    """0 when it is none, as in the engine we replace."""
    try:
        return int(text)
    except ValueError:
        return 0


def _json(text: str, what: str, refuse: type[EngineError]) -> Any:
    if not text:
        return None
    try:
        return wire.parse_json(text)
    except wire.MalformedJSON as error:
        raise refuse(f"{what}: {error.message}" if what else error.message) from None


def _strings(text: str, what: str, *, nulls: bool = False) -> dict[str, Any]:
    value = _json(text, what, InvalidParameter)
    if value is None:
        return {}
    kinds = (str, type(None)) if nulls else (str,)
    go = "*string" if nulls else "string"
    wrong = value if not isinstance(value, dict) else [one for one in value.values() if not isinstance(one, kinds)][:1]
    if isinstance(value, dict) and not wrong:
        return value
    kind, target = (wire.kind_of(wrong[0]), "string") if isinstance(value, dict) else (
        wire.kind_of(value), f"map[string]{go}"
    )  # fmt: skip
    raise InvalidParameter(f"{what}: json: cannot unmarshal {kind} into Go value of type {target}")


def _list(text: str) -> tuple[str, ...]:
    value = _json(text, "", SystemFailure)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise SystemFailure("json: cannot unmarshal into Go value of type []string")
    return tuple(value)
