"""What a result depends on beside its input: the release, the commit of some files, and the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def release() -> str:
    """The version that is installed."""
    try:
        return version("recsys")
    except PackageNotFoundError:
        return "(not installed)"


def git(folder: Path, *arguments: str) -> str:
    """What git says of a folder; nothing where it is not under version control, or there is no git."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def head(folder: Path) -> str:
    """The commit checked out; empty where there is none."""
    return git(folder, "rev-parse", "--verify", "-q", "HEAD").strip()


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()
