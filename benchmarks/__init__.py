"""Benchmarks: `python -m benchmarks.step`, `.idle`, `.cpu`, `.kernels`; results are in `benchmarks/results/`.

Not part of the package. Each prints a table, and writes JSON that holds the raw samples where it is told to.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures depend on: cores, CPU model, load, versions, the time."""
    models = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "cpu": ", ".join(sorted(models)) or platform.processor() or platform.machine(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("vllm", "torch", "pyzmq", "kvsdk")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def version(package: str) -> str | None:
    """What is installed of a package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` of 100 samples do not exceed; nan without samples."""
    if not samples:
        return float("nan")
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1).__int__())]


def table(rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, the first one to the left; floats with three digits after the point."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result with the machine's description, unless `out` is None."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), **result}, separators=(",", ":")) + "\n")
