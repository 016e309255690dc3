"""Where a recorded number comes from: versions, commit and machine."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import simreg
from simreg.recipe.checkpoints import write_atomically

_MODEL_FILES = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}


def versions() -> dict[str, str | None]:
    """Of this package (with its commit) and of what the numbers depend on."""
    return {
        "simreg": simreg.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
    }


def fingerprint(model: Path) -> str:
    """Hash of a model's folder: weights, configuration and tokenizer."""
    files = (f for f in sorted(model.iterdir()) if f.is_file() and f.suffix in _MODEL_FILES)
    return _hash(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.cache  # a command asks several times, for gigabytes
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b()
    for path, size, _ in files:
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def commit() -> str | None:
    """The commit of the checkout that this package runs from ("-dirty" if changed); of an installed
    one "files-" and a hash of its code."""
    package = Path(simreg.__file__).parent
    root = package.parents[1]
    if not (root / ".git").exists():
        return _of_files(package)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        # Not `describe --dirty`, whose lock a killed process would leave in the checkout.
        changes = _git(root, "--no-optional-locks", "status", "--porcelain", "-uno")
        return f"{found}-dirty" if changes else found
    return None


def _of_files(package: Path) -> str:
    digest = hashlib.blake2b()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return f"files-{digest.hexdigest()[:12]}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Platform, device, CPU and threads."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    """The processor's name; Linux does not give it to `platform`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def check_writable(out: Path) -> Path:
    """`out`, whose folder is made; OSError before a measurement that could not be written there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        return out


def write(out: Path, measured: dict[str, Any]) -> None:
    """A benchmark's record: what a script measured, its command line, machine and versions."""
    command = shlex.join(["python", *sys.argv])
    record = {**measured, "command": command, "machine": machine(), "versions": versions()}
    write_atomically(out, json.dumps(record, indent=1) + "\n")
