"""What the hardware counts while each kernel runs: ``python -m benchmarks.gpu_ncu NETWORK CSV``.

Runs Nsight Compute over one forward and backward (:mod:`benchmarks.gpu_kernels`), keeps all that it
found in the CSV file, and prints what matters most. The clocks are left as they are, and the caches
are empty before each kernel.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_tools import find_tool, short

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
#: What is printed of a kernel, and by what name.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors/load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors/store",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "active warps",
    "launch__registers_per_thread": "registers",
}


def command_of(ncu: str, network: str, path: Path, metrics: Sequence[str]) -> list[str]:
    return [
        *(ncu, "--csv", "--page", "raw", "--log-file", str(path), "--clock-control", "none"),
        *("--profile-from-start", "off", "--target-processes", "all"),
        *(("--metrics", ",".join(metrics)) if metrics else ()),
        *(word for section in SECTIONS for word in ("--section", section)),
        *(sys.executable, "-m", "benchmarks.gpu_kernels", network),
    ]


def table(text: str) -> list[str]:
    """A line for each kernel of ``ncu --csv --page raw``, whose second row holds the units."""
    start = text.find('"ID"')
    rows = list(csv.DictReader(text[start:].splitlines())) if start >= 0 else []
    if len(rows) < 2:
        return []
    units, *kernels = rows
    return [
        f"{short(row['Kernel Name']):<16} "
        + ", ".join(
            f"{name} {row[metric]} {units[metric] or ''}".rstrip()
            for metric, name in METRICS.items()
            if row.get(metric)
        )
        for row in kernels
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_ncu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network")
    parser.add_argument("csv", type=Path)
    options = parser.parse_args(arguments)
    ncu = find_tool("ncu")
    if ncu is None:
        print("ncu was found neither on PATH nor under CUDA_HOME")
        return 1
    # A version that does not know one of the metrics refuses them all.
    for metrics in (list(METRICS), []):
        options.csv.unlink(missing_ok=True)
        command = command_of(ncu, options.network, options.csv, metrics)
        status = subprocess.run(command).returncode
        text = options.csv.read_text(errors="replace") if options.csv.exists() else ""
        lines = table(text)
        print("\n".join(lines or text.splitlines()[-20:]))
        if lines and status == 0:
            print(f"{len(lines)} kernels counted")
            return 0
        print(f"ncu: exit status {status}, {len(lines)} kernels", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
