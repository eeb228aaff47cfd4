"""hosts, hostname and resolv.conf of a container: made anew at every start, on the exec root: memory, not flash."""

from __future__ import annotations

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


class NetworkFiles:
    """Writes the three files of each container."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def place(self, container: Container, state: SandboxState) -> None:
        """Say in the record where the files are."""
        directory = self._engine.config.exec_root / "containers" / container.id
        state.resolv_conf_path = str(directory / "resolv.conf")
        state.hostname_path = str(directory / "hostname")
        state.hosts_path = str(directory / "hosts")

    def write(self, container: Container, addresses: Sequence[str], *, host: bool) -> None:
        """Make the files of a starting container.

        Args:
            addresses: its own, one for each network. host: it has the host's network.

        Raises: OSError.
        """
        state = container.sandbox
        Path(state.hosts_path).parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path, content in (
            (state.hosts_path, self._hosts(container, addresses, host=host)),
            (state.hostname_path, f"{container.config.hostname}\n"),
            (state.resolv_conf_path, self._resolv_conf(container, host=host)),
        ):
            file = Path(path)
            file.unlink(missing_ok=True)  # a former start's may be mounted in a container that shares the network
            file.write_text(content)
            file.chmod(0o644)

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

    def _resolv_conf(self, container: Container, *, host: bool) -> str:
        own, config = container.host_config, self._engine.config
        if host and not (own.dns or own.dns_search or own.dns_options):
            return _read(RESOLV_CONF)
        return hostfiles.container_resolv_conf(
            host_resolv_conf(),
            own.dns or config.dns,
            own.dns_search or config.dns_search,
            own.dns_options or config.dns_opts,
        ).render()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
