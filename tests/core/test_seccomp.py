from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from balenapy.core import seccomp_profile
from balenapy.core.ociconfig import ALL_CAPABILITIES, DEFAULT_CAPABILITIES
from balenapy.core.seccomp import ENOSYS, custom_seccomp, default_seccomp
from balenapy.errors import SystemFailure

FACTS = json.loads((Path(__file__).parent.parent / "data/fixtures/seccomp_default.json").read_text())
DEFAULT = frozenset(DEFAULT_CAPABILITIES)


def always_allowed(profile: dict[str, Any]) -> set[str]:
    rules = profile["syscalls"]
    return {
        name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for name in rule["names"]
    }


def rules_for(profile: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [rule for rule in profile["syscalls"] if name in rule["names"]]


def test_everything_the_reference_always_allows_is_allowed() -> None:
    assert sorted(seccomp_profile.ALWAYS) == sorted(FACTS["always"])
    assert set(FACTS["always"]) <= always_allowed(default_seccomp(DEFAULT, "amd64"))


def test_beyond_the_reference_there_are_only_the_newer_calls() -> None:
    allowed = always_allowed(default_seccomp(frozenset(), "s390"))
    by_arch = {name for names in (each["syscalls"] for each in FACTS["by_arch"]) for name in names}

    assert allowed - set(FACTS["always"]) - by_arch == set(seccomp_profile.NEWER)


@pytest.mark.parametrize("capability", sorted(FACTS["by_cap"]))
def test_a_capability_brings_its_calls(capability: str) -> None:
    names = set(FACTS["by_cap"][capability])

    assert names <= always_allowed(default_seccomp(DEFAULT | {capability}, "amd64"))
    if capability not in DEFAULT:
        without = always_allowed(default_seccomp(frozenset(), "amd64"))
        assert not names & without


@pytest.mark.parametrize("entry", FACTS["by_arch"], ids=lambda entry: entry["arches"][0])
def test_an_architecture_brings_its_calls(entry: dict[str, Any]) -> None:
    for architecture in entry["arches"]:
        assert set(entry["syscalls"]) <= always_allowed(default_seccomp(DEFAULT, architecture))


@pytest.mark.parametrize("rule", [rule for rule in FACTS["argument_rules"] if rule["syscalls"] == ["personality"]])
def test_personality_is_allowed_with_known_values_only(rule: dict[str, Any]) -> None:
    profile = default_seccomp(DEFAULT, "amd64")

    assert rule["args"] in [each["args"] for each in rules_for(profile, "personality")]
    assert len(rules_for(profile, "personality")) == 5


def test_clone_makes_no_namespaces_without_sys_admin() -> None:
    plain, admin = default_seccomp(DEFAULT, "amd64"), default_seccomp(DEFAULT | {"CAP_SYS_ADMIN"}, "amd64")

    (rule,) = rules_for(plain, "clone")
    assert rule["args"] == [{"index": 0, "value": 0x7C020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    (clone3,) = rules_for(plain, "clone3")
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", ENOSYS)
    assert {"clone", "clone3"} <= always_allowed(admin)
    assert len(rules_for(admin, "clone")) == 1
    assert rules_for(default_seccomp(DEFAULT, "s390x"), "clone")[0]["args"][0]["index"] == 1


def test_architectures_are_those_of_the_reference() -> None:
    assert default_seccomp(DEFAULT, "amd64")["architectures"] == [
        "SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32",
    ]  # fmt: skip
    without = default_seccomp(DEFAULT, "amd64", frozenset({"SCMP_ARCH_X32"}))
    assert without["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert default_seccomp(DEFAULT, "arm64")["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert "architectures" not in default_seccomp(DEFAULT, "arm")
    for entry in FACTS["arch_map"]:
        assert seccomp_profile.ARCHITECTURES[entry["architecture"]] == tuple(entry["subArchitectures"])


def test_a_profile_of_a_client_is_filtered_by_its_conditions() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
            {"name": "write", "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["arm_x"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm"]}},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_KILL"]}},
            {"names": ["foo"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
             "args": [{"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]},
        ],
    }  # fmt: skip

    made = custom_seccomp(json.dumps(profile), DEFAULT, "amd64")

    assert made == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["foo"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
             "args": [{"index": 1, "value": 2, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]},
        ],
    }  # fmt: skip


def test_an_empty_profile_is_none() -> None:
    assert custom_seccomp("{}", DEFAULT, "amd64") is None


@pytest.mark.parametrize(
    "profile",
    ["x", "[]", '{"syscalls": [1]}', '{"syscalls": [{"names": ["a"]}]}', '{"syscalls": [{"name": "a", "names": [1]}]}',
     '{"architectures": ["a"], "archMap": [{}], "defaultAction": "x"}'],
)  # fmt: skip
def test_what_is_no_profile_is_refused(profile: str) -> None:
    with pytest.raises(SystemFailure):
        custom_seccomp(profile, ALL_CAPABILITIES, "amd64")
