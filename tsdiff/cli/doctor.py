"""`tsdiff doctor`: whether this installation can work, and what it would work with."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import click

from tsdiff.cli.app import FAILED
from tsdiff.cli.folders import try_writing
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import print_json, print_table

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only "missing" makes the installation unusable."""

    what: str
    status: Status
    detail: str


@click.command("doctor")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, metavar="FOLDER", help="Where runs would be written.")
@json_option
@debug_option
def command(out: Path, as_json: bool) -> int:
    """Check this installation.

    \b
    Try:
      tsdiff doctor

    Exit status 1 if something essential is missing.
    """
    findings = list(examine(out))
    if as_json:
        print_json({"ok": all(finding.status != "missing" for finding in findings), "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(("", "status", "detail"), [(finding.what, finding.status, finding.detail) for finding in findings])
    return FAILED if any(finding.status == "missing" for finding in findings) else 0


def examine(out: Path) -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield Finding("Python", "ok" if sys.version_info >= (3, 11) else "missing", f"{platform.python_version()} at {sys.executable} (3.11 or newer is needed)")
    yield Finding("platform", "ok", f"{platform.platform()}, {os.cpu_count()} CPU cores")
    yield from packages(requires("tsdiff") or [])
    yield from _torch()
    yield _torchvision()
    yield _memory()
    yield _writable("out folder", out)
    yield _writable("model cache", _hub_cache())
    yield from _network()
    yield from _plugins()


def packages(requirements: list[str], installed: Callable[[str], str] = version) -> Iterator[Finding]:
    """Whether each required distribution is there in the version that is needed, e.g. "torch>=2.6"; extras are no requirement.

    Args:
      installed: gives a distribution's version or raises PackageNotFoundError.
    """
    for requirement in requirements:
        if "extra ==" in requirement.replace("extra==", "extra =="):
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?", requirement)
        name, least = (match[1], match[2] or "0") if match else (requirement, "0")
        try:
            found = installed(name)
        except PackageNotFoundError:
            yield Finding(name, "missing", f"not installed; pip install '{requirement}'")
            continue
        if _numbers(found) < _numbers(least):
            yield Finding(name, "missing", f"{found} is too old; pip install '{requirement}'")
        else:
            yield Finding(name, "ok", found)


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version as numbers without trailing zeros: "2.13.0+cpu" is (2, 13)."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises ImportError, OSError or RuntimeError
        yield Finding("torch import", "missing", f"{type(error).__name__}: {error}")
        return
    yield Finding("torch", "ok", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    names = [f"cuda:{index} {torch.cuda.get_device_name(index)}, {_gb(torch.cuda.mem_get_info(index)[1])}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    yield Finding("devices", "ok", "; ".join(["cpu", *names]))


def _torchvision() -> Finding:
    from tsdiff.treesearch.imports import prepare_torchvision

    try:
        shimmed = prepare_torchvision()
        from importlib.util import find_spec

        if find_spec("torchvision") is None:
            return Finding("torchvision", "ok", "not installed; not needed")
        import torchvision  # type: ignore[import-untyped]

        how = "its compiled operators are for another torch; declared, not callable, not needed" if shimmed else "loads as it is"
        return Finding("torchvision", "ok", f"{torchvision.__version__}, {how}")
    except Exception as error:  # whatever it raises, transformers and open_clip will meet it too
        return Finding("torchvision", "warning", f"cannot be imported ({type(error).__name__}: {error}); transformers and open_clip may fail")


def _memory() -> Finding:
    try:
        pages, available = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "ok", "cannot be told on this platform")
    size = os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", "ok", f"{_gb(pages * size)}, {_gb(available * size)} free")


def _gb(count: float) -> str:
    return f"{count / 10**9:.1f} GB"


def _writable(what: str, folder: Path) -> Finding:
    try:
        there = try_writing(folder)
    except OSError as error:
        return Finding(what, "warning", f"{folder} cannot be written ({error.strerror})")
    return Finding(what, "ok", f"{folder}{'' if there else ' (will be made)'}")


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its documented environment variables."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")).expanduser()


def _network() -> Iterator[Finding]:
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    yield Finding("downloads", "ok", f"off ({', '.join(names)})" if names else "allowed; --offline forbids them")


def _plugins() -> Iterator[Finding]:
    """One finding for each kind of component, one more for each that cannot be loaded."""
    import importlib.metadata

    from tsdiff.cli.catalogue import KINDS

    for kind in KINDS:
        points = list(importlib.metadata.entry_points(group=f"tsdiff.{kind}"))
        broken = []
        for point in points:
            try:
                point.load()
            except Exception as error:  # a plug-in may raise anything
                broken.append((point, error))
        yield Finding(kind, "ok" if len(broken) < len(points) else "warning", f"{len(points) - len(broken)} of {len(points)} entry points load")
        for point, problem in broken:
            source = getattr(point.dist, "name", "an unknown package")
            yield Finding(f"{kind}: {point.name}", "warning", f"of {source}: {type(problem).__name__}: {problem}")
