"""hosts, hostname and resolv.conf of a container: made anew at every start, on the exec root: memory, not flash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from balenapy.core import hostfiles
from balenapy.core.container import Container, SandboxState
from balenapy.core.network import BRIDGE
from balenapy.errors import NotFound

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

RESOLV_CONF = Path("/etc/resolv.conf")
RESOLVED_STUB = ("127.0.0.53",)
RESOLVED_CONF = Path("/run/systemd/resolve/resolv.conf")  # the servers behind systemd-resolved's stub


def host_resolv_conf() -> hostfiles.ResolvConf:
    """How the host resolves."""
    found = hostfiles.parse_resolv_conf(_read(RESOLV_CONF))
    if found.nameservers == RESOLVED_STUB and RESOLVED_CONF.exists():
        return hostfiles.parse_resolv_conf(_read(RESOLVED_CONF))
    return found


class HostResolution:
    """How the host resolves now: read again when its files have changed, and looked at only when somebody asks."""

    def __init__(self) -> None:
        self._seen: object = None
        self._conf = hostfiles.ResolvConf()

    def current(self) -> hostfiles.ResolvConf:
        seen = [_stamp(path) for path in (RESOLV_CONF, RESOLVED_CONF)]
        if seen != self._seen:
            self._conf, self._seen = host_resolv_conf(), seen
        return self._conf


class NetworkFiles:
    """Writes the three files of each container, and says which servers are behind its resolv.conf."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._host = HostResolution()

    def place(self, container: Container, state: SandboxState) -> None:
        """Say in the record where the files are."""
        directory = self._engine.config.exec_root / "containers" / container.id
        state.resolv_conf_path = str(directory / "resolv.conf")
        state.hostname_path = str(directory / "hostname")
        state.hosts_path = str(directory / "hosts")

    def write(
        self,
        container: Container,
        addresses: Sequence[str],
        *,
        host: bool,
        embedded: bool = False,
        ipv6: bool = False,
    ) -> None:
        """Make the files of a starting container.

        Args:
            addresses: its own on each network. host: it has the host's network. embedded: it asks our server.
            ipv6: it can ask servers by IPv6.

        Raises: OSError.
        """
        state = container.sandbox
        Path(state.hosts_path).parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        resolv_conf = self._resolv_conf(container, host=host, embedded=embedded, ipv6=ipv6)
        for path, content in (
            (state.hosts_path, self._hosts(container, addresses, host=host)),
            (state.hostname_path, f"{container.config.hostname}\n"),
            (state.resolv_conf_path, resolv_conf),
        ):
            file = Path(path)
            file.unlink(missing_ok=True)  # a former start's may be mounted in a container that shares the network
            file.write_text(content)
            file.chmod(0o644)
        if not host and not embedded:
            _hash_path(state).write_text(_hash(resolv_conf))

    def use_embedded(self, container: Container, *, ipv6: bool) -> None:
        """Have a running container ask our server from now on, unless it wrote resolv.conf itself. Raises: OSError."""
        path = Path(container.sandbox.resolv_conf_path)
        if _read(_hash_path(container.sandbox)) == _hash(_read(path)):
            # The same file: it is mounted.
            path.write_text(self._resolv_conf(container, host=False, embedded=True, ipv6=ipv6))
            _hash_path(container.sandbox).unlink()

    def forwarders(self, container: Container, *, ipv6: bool) -> tuple[hostfiles.Forwarder, ...]:
        """The servers that are asked what ours does not know."""
        chosen = container.host_config.dns or self._engine.config.dns
        return hostfiles.forwarders(self._host.current(), chosen, ipv6=ipv6)

    def wants_search_domains(self, container: Container) -> bool:
        return hostfiles.wants_search_domains(self._effective(container, ipv6=False))

    def rewrite_hosts(self, container: Container, addresses: Sequence[str]) -> None:
        """Change the hosts file of a running container: the same file, since it is mounted. Raises: OSError."""
        Path(container.sandbox.hosts_path).write_text(self._hosts(container, addresses, host=False))

    def _hosts(self, container: Container, addresses: Sequence[str], *, host: bool) -> str:
        extra = [hostfiles.parse_extra_host(text) for text in container.host_config.extra_hosts or ()]
        if host and not extra:
            return _read("/etc/hosts")
        own = hostfiles.own_names(container.config.hostname, container.config.domainname)
        return hostfiles.hosts_text([*extra, *self._links(container), *((address, own) for address in addresses)])

    def _links(self, container: Container) -> Iterable[tuple[str, str]]:
        """Legacy links: the other container's address under its alias, hostname and name."""
        for link in container.host_config.links or ():
            container_id, _, alias = link.partition(":")
            try:
                other = self._engine.containers.find(container_id)
            except NotFound:
                continue
            settings = other.endpoints.get(BRIDGE)
            if settings is not None and settings.ip_address:
                names = dict.fromkeys((alias or other.name, other.config.hostname, other.name))
                yield settings.ip_address, " ".join(names)

    def _resolv_conf(self, container: Container, *, host: bool, embedded: bool, ipv6: bool) -> str:
        own = container.host_config
        if host and not (own.dns or own.dns_search or own.dns_options):
            return _read(RESOLV_CONF)
        conf = self._effective(container, ipv6=ipv6)
        return (hostfiles.embedded_resolv_conf(conf) if embedded else conf).render()

    def _effective(self, container: Container, *, ipv6: bool) -> hostfiles.ResolvConf:
        own, config = container.host_config, self._engine.config
        return hostfiles.container_resolv_conf(
            self._host.current(),
            own.dns or config.dns,
            own.dns_search or config.dns_search,
            own.dns_options or config.dns_opts,
            ipv6=ipv6,
        )


def _hash_path(state: SandboxState) -> Path:
    """Beside the file: the hash of what we wrote, to know what its container wrote."""
    return Path(f"{state.resolv_conf_path}.hash")


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
