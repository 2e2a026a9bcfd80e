"""The surroundings of a run: device, machine, package versions, git revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "hardvary",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "optuna",
    "matplotlib",
)


def describe_environment() -> dict[str, Any]:
    """The part of a manifest that says where a result comes from."""
    import jax

    device = jax.devices()[0]
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        # They choose instructions and libraries.
        "xla_flags": os.environ.get("XLA_FLAGS"),
        # They choose how memory comes from the system.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "git": git_revision(Path(__file__).parent),
    }


def git_revision(directory: Path) -> dict[str, Any] | None:
    """Revision of the checkout around `directory`, None outside of git.

    `dirty` is true when files differ from that revision or are new, ignored ones
    aside.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        return output.stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain") != ""
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "dirty": dirty}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
