"""Start-up time: how long the commands take that need neither torch nor a model.

    python benchmarks/startup.py [--json] [--repeats N]

Every run is a new process; the first of each kind warms the disk cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

GOALS = {"help": 0.3}  # seconds


def program() -> str:
    """The `tsdiff` program of the Python that runs this."""
    found = shutil.which("tsdiff", path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"tsdiff is not installed beside {sys.executable}; pip install -e .")
    return found


def commands() -> dict[str, list[str]]:
    """What is timed, by name; "python" is what the interpreter itself needs."""
    return {
        "help": [program(), "--help"],
        "search_help": [program(), "search", "--help"],
        "list_policies": [program(), "list", "policies"],
        "import": [sys.executable, "-c", "import tsdiff"],
        "python": [sys.executable, "-c", "pass"],
    }


def seconds(command: list[str], repeats: int) -> list[float]:
    """Wall times of a command, which must succeed."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        times.append(time.perf_counter() - started)
    return times[1:]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Start-up time of tsdiff.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=15, help="counted runs of each command")
    options = parser.parse_args()
    report: dict[str, object] = {"machine": platform.platform(), "python": platform.python_version(), "repeats": options.repeats, "goals": GOALS}
    lines = []
    for name, command in commands().items():
        times = seconds(command, options.repeats)
        report[f"{name}_seconds"] = {"min": round(min(times), 4), "median": round(statistics.median(times), 4)}
        shown = " ".join([Path(command[0]).name, *command[1:]])
        goal = f"   goal {GOALS[name]:.2f}" if name in GOALS else ""
        lines.append(f"{shown:30} min {min(times):.3f} s   median {statistics.median(times):.3f} s{goal}")
    print(json.dumps(report) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
