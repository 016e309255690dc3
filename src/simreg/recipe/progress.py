"""What a run tells: the lines of metrics.jsonl, the line on the terminal, time and MFU."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simreg.recipe.checkpoints import write_atomically
from simreg.recipe.errors import UserError
from simreg.recipe.processes import warn

# Dense bfloat16 FLOP/s (float16 before Ampere) from the data sheets; the first match counts.
_PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def console(**options: Any) -> Console:
    """Where a command prints: names and paths as they are, lines as long as they are."""
    return Console(highlight=False, markup=False, soft_wrap=True, **options)


def silence() -> None:
    """Send to nowhere what is still printed, once nobody can read it."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of one device in bfloat16, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = _PEAK_FLOPS.items()  # by words: an RTX A1000 is no A100
    return next((peak for known, peak in peaks if re.search(rf"\b{known}\b", name)), None)


class Clock:
    """Seconds of training, carried over a resume; evaluation and checkpoints are excluded."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Counted up to now."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._seconds, self._since = self.seconds, None
        try:
            yield
        finally:
            self.start()


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended as the run goes."""

    def __init__(self, path: Path, step: int, expected: int = 0) -> None:
        """Open for a run that continues after `step`: what was written beyond it is dropped.

        Warns if fewer than `expected` lines are left.
        """
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        if len(kept) < expected:
            lost = expected - len(kept)
            warn(f"{path} lacks {lost} of its {expected} lines up to step {step}: curves have gaps")
        self.lines = len(kept)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, at once visible to readers."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.lines += 1

    def sync(self) -> None:
        """Force it to disk: a checkpoint must not outlive the lines that led to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        found = [json.loads(line) for line in lines[:-1]]
        if not all({"kind", "step"} <= record.keys() for record in found):
            raise ValueError
        return found
    except (ValueError, AttributeError):
        raise UserError(
            f"{path} is damaged: restore it or start the run in another folder"
        ) from None


def log_line(record: dict[str, Any], *, total: int) -> str:
    """One line for the terminal, for a training or an evaluation record."""
    width = len(str(total))
    head = f"step {record['step']:>{width}}/{total} {100 * record['step'] / total:5.1f}%"
    head += f"  {tokens(record['tokens'])} tok"
    if record["kind"] == "eval":
        return f"{head}  validation ce {record['ce']:.4f}"
    if record["kind"] == "geometry":
        names = ("intra_cos", "inter_cos", "effective_rank", "margin_p50")
        return "  ".join([head, "geometry", *(f"{n} {_number(record[n])}" for n in names)])
    parts = [head, f"ce {record['ce']:.4f}"]
    if record["simreg"] is not None:
        parts.append(f"simreg {record['simreg']:.4f}")
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"grad-norm {record['grad_norm']:.2f}")
    parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts.append(f"eta {duration(record['eta'])}")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}"


def tokens(count: float) -> str:
    """`950`, `61.4k`, `1.23M`, `2.05B`: three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g}{unit}".replace(f".{unit}", unit)
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """`7s`, `3m12s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
