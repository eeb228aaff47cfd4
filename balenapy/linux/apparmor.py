"""AppArmor: whether the kernel has it, and the profile `docker-default`, which somebody must load before it is used.

Without apparmor_parser it cannot be loaded; containers are then not confined by default, as with balena-engine.
Source: moby profiles/apparmor/template.go (20.10), apparmor.go InstallDefault.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

DEFAULT_PROFILE = "docker-default"
ENABLED = Path("/sys/module/apparmor/parameters/enabled")
LOADED = Path("/sys/kernel/security/apparmor/profiles")
POLICIES = Path("/etc/apparmor.d")
LOAD_TIMEOUT_S = 30

_PROFILE = """\
profile {name} flags=(attach_disconnected,mediate_deleted) {{
{base}
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (receive) peer={daemon},
  signal (send,receive) peer={name},

  deny @{{PROC}}/* w,
  deny @{{PROC}}/{{[^1-9],[^1-9][^0-9],[^1-9s][^0-9y][^0-9s],[^1-9][^0-9][^0-9][^0-9]*}}/** w,
  deny @{{PROC}}/sys/[^k]** w,
  deny @{{PROC}}/sys/kernel/{{?,??,[^s][^h][^m]**}} w,
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/kcore rwklx,

  deny mount,

  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/fs/cg[^r]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,

  ptrace (trace,read,tracedby,readby) peer={name},
}}
"""


def is_enabled() -> bool:
    """Whether the kernel confines by AppArmor."""
    try:
        return ENABLED.read_text().startswith("Y")
    except OSError:
        return False


def ensure_default_profile(parser: str = "apparmor_parser") -> bool:
    """See that `docker-default` can be used; False when it cannot. Blocks: for start."""
    if _is_loaded():
        return True
    program = shutil.which(parser, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        log.warning("AppArmor is on but apparmor_parser is missing: containers are not confined by it by default")
        return False
    try:
        # -K: nothing in the cache; -r: over one that is there.
        done = subprocess.run(
            [program, "-Kr"],
            input=profile_text().encode(),
            capture_output=True,
            timeout=LOAD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("cannot run apparmor_parser error=%s", error)
        return False
    if done.returncode != 0:
        log.error("cannot load AppArmor profile %s: %s", DEFAULT_PROFILE, done.stderr.decode(errors="replace").strip())
        return False
    log.info("loaded AppArmor profile %s", DEFAULT_PROFILE)
    return True


def profile_text() -> str:
    """The profile, for the policies that this machine has."""
    head = "#include <tunables/global>\n" if (POLICIES / "tunables/global").exists() else "@{PROC}=/proc/\n"
    base = "  #include <abstractions/base>\n" if (POLICIES / "abstractions/base").exists() else ""
    return head + "\n" + _PROFILE.format(name=DEFAULT_PROFILE, base=base, daemon=_own_profile())


def _own_profile() -> str:
    """What we are confined by ourselves: signals come from there."""
    try:
        text = Path("/proc/self/attr/current").read_text()
    except OSError:
        return "unconfined"
    return text.partition(" (")[0].strip() or "unconfined"


def _is_loaded() -> bool:
    try:
        lines = LOADED.read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith(f"{DEFAULT_PROFILE} (") for line in lines)
