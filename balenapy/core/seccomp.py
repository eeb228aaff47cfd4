"""Seccomp: a profile (ours, or a client's in Docker's JSON form) -> the `linux.seccomp` of an OCI spec.

A profile is a list of rules, each with conditions on architecture and capabilities; what a container gets is the rules
whose conditions its bounding set and this machine meet. Architectures are named as Go does: amd64, arm64, arm, 386.
Source: moby profiles/seccomp/seccomp.go, seccomp_default.go.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from balenapy.core.wire import MalformedJSON, parse_json
from balenapy.errors import SystemFailure

ENOSYS = 38

# Go architecture -> libseccomp's name; none for 32-bit ARM and others: libseccomp then takes the native one.
_NATIVE = {
    "amd64": "SCMP_ARCH_X86_64",
    "arm64": "SCMP_ARCH_AARCH64",
    "mips64": "SCMP_ARCH_MIPS64",
    "mips64n32": "SCMP_ARCH_MIPS64N32",
    "mipsel64": "SCMP_ARCH_MIPSEL64",
    "mipsel64n32": "SCMP_ARCH_MIPSEL64N32",
    "s390x": "SCMP_ARCH_S390X",
    "riscv64": "SCMP_ARCH_RISCV64",
}


@lru_cache(maxsize=4)
def default_seccomp(
    capabilities: frozenset[str], architecture: str, unusable: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The default profile for a bounding set; the result is shared: do not change it.

    Args:
        unusable: sub-architectures (libseccomp's names) whose programs this kernel cannot run. Each one that is left
            out makes the filter a third smaller, and a container starts some milliseconds sooner.
    """
    from balenapy.core import seccomp_profile as data

    allowed = [*data.ALWAYS, *data.NEWER]
    for architectures, names in data.BY_ARCH:
        if architecture in architectures:
            allowed += names.split()
    for capability, names in data.BY_CAPABILITY:
        if capability in capabilities:
            allowed += names.split()
    syscalls: list[dict[str, Any]] = [_allow(sorted(set(allowed)))]
    syscalls += [
        _allow(["personality"], {"index": 0, "value": value, "valueTwo": 0, "op": "SCMP_CMP_EQ"})
        for value in data.PERSONALITIES
    ]
    if "CAP_SYS_ADMIN" not in capabilities:
        index = 1 if architecture in ("s390", "s390x") else 0  # flags are clone's second argument there
        argument = {"index": index, "value": data.CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        syscalls.append(_allow(["clone"], argument))
        syscalls.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
    result: dict[str, Any] = {"defaultAction": "SCMP_ACT_ERRNO"}
    native = _NATIVE.get(architecture, "")
    if native in data.ARCHITECTURES:
        result["architectures"] = [native, *(each for each in data.ARCHITECTURES[native] if each not in unusable)]
    result["syscalls"] = syscalls
    return result


def _allow(names: list[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW"}
    if arguments:
        rule["args"] = list(arguments)
    return rule


def custom_seccomp(profile: str, capabilities: Collection[str], architecture: str) -> dict[str, Any] | None:
    """A client's profile; None if it says nothing at all (seccomp is then off).

    Raises: SystemFailure, when it is not a profile.
    """
    try:
        document = parse_json(profile)
    except MalformedJSON as error:
        raise SystemFailure(f"Decoding seccomp profile failed: {error.message}") from None
    if not isinstance(document, dict):
        raise SystemFailure("Decoding seccomp profile failed: it is not an object")
    try:
        return _convert({key.lower(): value for key, value in document.items()}, capabilities, architecture)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise SystemFailure(f"Decoding seccomp profile failed: {error}") from error


def _convert(document: dict[str, Any], capabilities: Collection[str], architecture: str) -> dict[str, Any] | None:
    rules = document.get("syscalls") or []
    action = document.get("defaultaction") or ""
    if not action and not rules:
        return None
    architectures, arch_map = document.get("architectures") or [], document.get("archmap") or []
    if architectures and arch_map:
        raise SystemFailure(
            "'architectures' and 'archMap' were specified in the seccomp profile, "
            "use either 'architectures' or 'archMap'"
        )
    native = _NATIVE.get(architecture)
    for entry in arch_map:
        if native is not None and entry.get("architecture") == native:
            architectures = [native, *(entry.get("subArchitectures") or [])]
            break
    result: dict[str, Any] = {"defaultAction": action}
    if document.get("defaulterrnoret") is not None:
        result["defaultErrnoRet"] = document["defaulterrnoret"]
    if architectures:
        result["architectures"] = list(architectures)
    result["syscalls"] = [_rule(rule) for rule in rules if _applies(rule, capabilities, architecture) and _names(rule)]
    return result


def _names(rule: dict[str, Any]) -> list[str]:
    name, names = rule.get("name") or "", rule.get("names") or []
    if name and names:
        raise SystemFailure("'name' and 'names' were specified in the seccomp profile, use either 'name' or 'names'")
    return [name] if name else list(names)


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"names": _names(rule), "action": rule["action"]}
    if rule.get("errnoRet") is not None:
        result["errnoRet"] = rule["errnoRet"]
    if rule.get("args"):
        result["args"] = [
            {
                "index": argument.get("index", 0),
                "value": argument.get("value", 0),
                "valueTwo": argument.get("valueTwo", 0),
                "op": argument["op"],
            }
            for argument in rule["args"]
        ]
    return result


def _applies(rule: dict[str, Any], capabilities: Collection[str], architecture: str) -> bool:
    excludes, includes = rule.get("excludes") or {}, rule.get("includes") or {}
    if architecture in (excludes.get("arches") or []):
        return False
    if any(capability in capabilities for capability in excludes.get("caps") or []):
        return False
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    return all(capability in capabilities for capability in includes.get("caps") or [])
