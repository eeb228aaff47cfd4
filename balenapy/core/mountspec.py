"""Where a container's mounts come from: the grammar of Binds, the checks of Mounts, volumes-from, driver options.

Nothing here looks at the disk; whether a source exists is for whoever mounts it.
Source: moby volume/mounts/linux_parser.go, parser.go, daemon/volumes.go.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from balenapy.core.container import BindOptions, Mount, MountPoint, TmpfsOptions, VolumeDriver, VolumeOptions
from balenapy.errors import EngineError, InvalidParameter, SystemFailure

DEFAULT_PROPAGATION = "rprivate"
LOCAL = "local"

_RW = frozenset(("rw", "ro"))
_LABEL = frozenset(("z", "Z"))
_PROPAGATION = frozenset(("private", "rprivate", "shared", "rshared", "slave", "rslave"))
_COPY = frozenset(("nocopy",))
_CONSISTENCY = frozenset(("consistent", "cached", "delegated", "default"))
_MODE_SETS = (_RW, _LABEL, _PROPAGATION, _COPY, _CONSISTENCY)

_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")

# Word of `o=` -> (flag of mount(2), whether the word clears it). Source: moby pkg/mount/flags_linux.go.
_MOUNT_FLAGS: dict[str, tuple[int, bool]] = {
    "defaults": (0, False), "ro": (1, False), "rw": (1, True), "nosuid": (2, False), "suid": (2, True),
    "nodev": (4, False), "dev": (4, True), "noexec": (8, False), "exec": (8, True), "sync": (16, False),
    "async": (16, True), "remount": (32, False), "mand": (64, False), "nomand": (64, True), "dirsync": (128, False),
    "noatime": (1024, False), "atime": (1024, True), "nodiratime": (2048, False), "diratime": (2048, True),
    "bind": (4096, False), "rbind": (4096 | 16384, False), "unbindable": (1 << 17, False),
    "runbindable": (1 << 17 | 16384, False), "private": (1 << 18, False), "rprivate": (1 << 18 | 16384, False),
    "slave": (1 << 19, False), "rslave": (1 << 19 | 16384, False), "shared": (1 << 20, False),
    "rshared": (1 << 20 | 16384, False), "relatime": (1 << 21, False), "norelatime": (1 << 21, True),
    "strictatime": (1 << 24, False), "nostrictatime": (1 << 24, True),
}  # fmt: skip


class _Invalid(Exception):
    """What is wrong with a mount, without the sentence around it."""


def parse_bind(text: str, volume_driver: str = "") -> MountPoint:
    """`[source:]target[:mode]` of HostConfig.Binds. An anonymous volume comes back with an empty name.

    Raises: SystemFailure (500 in the engine we replace).
    """
    parts = text.split(":")
    if len(parts) > 3 or not parts[0] or (len(parts) == 2 and _is_mode(parts[1])):
        raise SystemFailure(f"invalid volume specification: '{text}'")
    source, target = parts[:2] if len(parts) > 1 else ("", parts[0])
    mode = parts[2] if len(parts) == 3 else ""
    if not _is_mode(mode):
        raise SystemFailure(f"invalid mode: {mode}")
    words = mode.split(",")
    mount = Mount(
        type="bind" if source.startswith("/") else "volume",
        source=source,
        target=target,
        read_only="ro" in words,
    )
    no_copy = "nocopy" in words
    driver = VolumeDriver(name=volume_driver) if volume_driver and mount.type == "volume" else None
    if no_copy or driver:
        mount.volume_options = VolumeOptions(no_copy=no_copy, driver_config=driver)
    propagation = next((word for word in words if word in _PROPAGATION), "")
    if propagation:
        mount.bind_options = BindOptions(propagation=propagation)
    try:
        point = _resolve(mount)
    except InvalidParameter as error:
        raise SystemFailure(f"invalid volume specification: '{text}': {error.message}") from error
    point.mode = mode
    point.spec = None
    return point


def has_own_propagation(point: MountPoint) -> bool:
    """Whether whoever asked for the bind said how it propagates."""
    if point.spec is not None and point.spec.bind_options is not None:
        return bool(point.spec.bind_options.propagation)
    return any(word in _PROPAGATION for word in point.mode.split(","))


def resolve_mount(mount: Mount) -> MountPoint:
    """An entry of HostConfig.Mounts. An anonymous volume comes back with an empty name.

    Raises: InvalidParameter.
    """
    point = _resolve(mount)
    point.must_exist = mount.type == "bind"
    return point


def _resolve(mount: Mount) -> MountPoint:
    try:
        _check(mount)
    except _Invalid as error:
        raise InvalidParameter(f'invalid mount config for type "{mount.type}": {error}') from None
    point = MountPoint(
        type=mount.type,
        destination=clean_path(mount.target),
        rw=not mount.read_only,
        spec=mount,
    )
    if mount.type == "bind":
        point.source = clean_path(mount.source)
        point.propagation = (mount.bind_options and mount.bind_options.propagation) or DEFAULT_PROPAGATION
    elif mount.type == "volume":
        options = mount.volume_options or VolumeOptions()
        point.name = mount.source
        point.anonymous = not mount.source
        point.driver = options.driver_config.name if options.driver_config else ""
        point.no_copy = options.no_copy
    return point


def _check(mount: Mount) -> None:
    if not mount.target:
        raise _Invalid("field Target must not be empty")
    if clean_path(mount.target) == "/":
        raise _Invalid("invalid specification: destination can't be '/'")
    _check_absolute(mount.target)
    if mount.type == "bind":
        if not mount.source:
            raise _Invalid("field Source must not be empty")
        propagation = mount.bind_options.propagation if mount.bind_options else ""
        if propagation and propagation not in _PROPAGATION:
            raise _Invalid(f"invalid propagation mode: {propagation}")
        _refuse(mount, "volume_options", "tmpfs_options")
        _check_absolute(mount.source)
    elif mount.type == "volume":
        _refuse(mount, "bind_options", "tmpfs_options")
        if mount.volume_options is not None and mount.volume_options.subpath:
            # Engines of 1.39 ignore it, and mount more than was asked for.
            raise _Invalid("VolumeOptions.Subpath needs API v1.45 or newer")
        if not mount.source and mount.read_only:
            raise _Invalid("must not set ReadOnly mode when using anonymous volumes")
    elif mount.type == "tmpfs":
        _refuse(mount, "bind_options", "volume_options")
        if mount.source:
            raise _Invalid("field Source must not be specified")
    else:
        raise _Invalid("mount type unknown")


def _check_absolute(path: str) -> None:
    if not path.startswith("/"):
        raise _Invalid(f"invalid mount path: '{path}' mount path must be absolute")


def _refuse(mount: Mount, *fields: str) -> None:
    names = {"bind_options": "BindOptions", "volume_options": "VolumeOptions", "tmpfs_options": "TmpfsOptions"}
    for field in fields:
        if getattr(mount, field) is not None:
            raise _Invalid(f"field {names[field]} must not be specified")


def _is_mode(mode: str) -> bool:
    if not mode:
        return True
    words = mode.split(",")
    known = all(any(word in each for each in _MODE_SETS) for word in words)
    return known and all(sum(word in each for word in words) <= 1 for each in _MODE_SETS)


def parse_volumes_from(text: str) -> tuple[str, bool]:
    """`container[:mode]` -> (container, whether writing is allowed).

    Raises: InvalidParameter.
    """
    name, colon, mode = text.partition(":")
    if not text:
        raise InvalidParameter("volumes-from specification cannot be an empty string")
    words = mode.split(",")
    if colon and (not _is_mode(mode) or any(word in _PROPAGATION | _COPY for word in words)):
        raise InvalidParameter(f"invalid mode: {mode}")
    return name, "ro" not in words


def volume_path(text: str) -> str:
    """A key of Config.Volumes (an image's VOLUME) as a clean path.

    Raises: SystemFailure for what is not one path.
    """
    if ":" in text:
        raise SystemFailure(f"invalid volume specification: '{text}'")
    if not text.startswith("/"):
        raise SystemFailure(
            f"invalid volume specification: '{text}': invalid mount path: '{text}' mount path must be absolute"
        )
    path = clean_path(text)
    if path == "/":
        raise SystemFailure(f"invalid volume specification: '{text}': invalid specification: destination can't be '/'")
    return path


def clean_path(path: str) -> str:
    """Go's path.Clean; normpath alone keeps two leading slashes, as POSIX wants."""
    return posixpath.normpath(f"/{path.lstrip('/')}" if path.startswith("/") else path)


def duplicate(target: str) -> EngineError:
    return InvalidParameter(f"Duplicate mount point: {target}")


def tmpfs_mount_options(options: TmpfsOptions | None, *, read_only: bool) -> list[str]:
    """Options of a tmpfs of HostConfig.Mounts."""
    found = ["noexec", "nosuid", "nodev", DEFAULT_PROPAGATION]
    if read_only:
        found.append("ro")
    if options is not None and options.mode:
        found.append(f"mode={options.mode:o}")
    if options is not None and options.size_bytes:
        size, suffix = options.size_bytes, ""
        for suffix_of in "kmg":
            if size % 1024:
                break
            size, suffix = size // 1024, suffix_of
        found.append(f"size={size}{suffix}")
    return found


def check_volume_name(name: str) -> None:
    """The name of a volume of the local driver.

    Raises: InvalidParameter. Source: moby volume/local/local.go validateName.
    """
    if len(name) == 1:
        raise InvalidParameter(
            f"create {name}: volume name is too short, names should be at least two alphanumeric characters"
        )
    if not _VOLUME_NAME.fullmatch(name):
        raise InvalidParameter(
            f'create {name}: "{name}" includes invalid characters for a local volume name, only '
            '"[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path'
        )


def check_driver_options(name: str, options: Sequence[str]) -> None:
    """Keys the local driver knows.

    Raises: InvalidParameter.
    """
    for key in options:
        if key not in ("type", "o", "device"):
            raise InvalidParameter(f'create {name}: invalid option key: "{key}"')


def parse_mount_options(text: str) -> tuple[int, str]:
    """The `o` option of a volume -> (flags, data) of mount(2).

    Source: moby pkg/mount/flags.go parseOptions.
    """
    flags = 0
    data = []
    for word in text.split(",") if text else ():
        if word in _MOUNT_FLAGS:
            flag, clears = _MOUNT_FLAGS[word]
            flags = flags & ~flag if clears else flags | flag
        else:
            data.append(word)
    return flags, ",".join(data)
