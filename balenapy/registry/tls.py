"""TLS settings of one host: the system's authorities, and what `certs.d/<host>/` adds.

`ssl` is imported when a context is made: 5 MB that an engine without registries need not have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    import ssl

CERTIFICATE_DIRECTORIES = (Path("/etc/balena-engine/certs.d"), Path("/etc/docker/certs.d"))

# crypto/x509 root_linux.go: where distributions keep the authorities
_ROOT_DIRECTORIES = ("/etc/ssl/certs", "/etc/pki/tls/certs")
_ROOT_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def tls_context(
    host: str,
    *,
    verify: bool,
    directories: Sequence[Path] = CERTIFICATE_DIRECTORIES,
    environment: Mapping[str, str] = os.environ,
) -> ssl.SSLContext:
    """TLS settings for one registry: the system's authorities and what `certs.d/<host>/` adds. Blocks.

    `*.crt` are authorities, `*.cert` with `*.key` are client certificates.

    Raises:
        InvalidParameter: half of a client certificate is missing, or a file cannot be read as what it must be.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if verify:
        _load_roots(context, environment)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for directory in directories:
        if host.strip("."):  # neither "" nor "..": other characters of a path cannot be in a host
            _load_host_directory(context, directory / host)
    return context


def _load_roots(context: ssl.SSLContext, environment: Mapping[str, str]) -> None:
    named_file, named_directory = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    if named_file or named_directory:
        for name in (named_file, *(named_directory or "").split(":")):
            if name and os.path.exists(name):
                file, directory = (None, name) if os.path.isdir(name) else (name, None)
                context.load_verify_locations(file, directory)
        return
    # A hashed directory is read authority by authority as needed; the bundle costs a megabyte at once.
    for directory in _ROOT_DIRECTORIES:
        try:
            if any(name.endswith(".0") for name in os.listdir(directory)):
                context.load_verify_locations(capath=directory)
                return
        except OSError:
            continue
    for file in _ROOT_FILES:
        if os.path.exists(file):
            context.load_verify_locations(file)
            return


def _load_host_directory(context: ssl.SSLContext, directory: Path) -> None:
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InvalidParameter(f"open {directory}: {(error.strerror or '').lower()}") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        path = directory / name
        try:
            if suffix == ".crt":
                context.load_verify_locations(path)
            elif suffix == ".cert":
                if f"{stem}.key" not in names:
                    raise InvalidParameter(
                        f"missing key {stem}.key for client certificate {name}. "
                        "Note that CA certificates should use the extension .crt"
                    )
                context.load_cert_chain(path, directory / f"{stem}.key")
            elif suffix == ".key" and f"{stem}.cert" not in names:
                raise InvalidParameter(f"missing client certificate {stem}.cert for key {name}")
        except OSError as error:  # which ssl.SSLError is too
            raise InvalidParameter(f"{path}: {error}") from error
