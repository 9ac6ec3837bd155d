"""Real faults for tests: searches in processes that are killed, meet a full disk, or may not write.

A program, so that processes can be forked from one that has imported everything; it prints one JSON object.

    python tests/support/real_faults.py kills --kills '{"beam": 2, "stable-diffusion": 1}' --seed 0
    python tests/support/real_faults.py full
    python tests/support/real_faults.py readonly
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "near (3, 2.4)"
TWO = [PROMPT, "near (0, 0)"]
DERIVED = ("tree.json", "baseline.json", "latents.safetensors", "best.png", "baseline.png")
GAUSSIAN: dict[str, dict[str, Any]] = {
    "best-of-n": {"policy": "best-of-n", "policy_options": {"n": 4}, "solver": "exact"},
    "beam": {"policy": "beam", "policy_options": {"width": 2, "branch": 3}, "solver": "dpm++2m-sde"},
    "zero-order": {"policy": "zero-order", "policy_options": {"neighbours": 2, "rounds": 4}, "keep": "none"},
    "smc": {"policy": "smc", "policy_options": {"particles": 4}, "eta": 1.0, "class_label": "rare", "guidance_scale": 2.0},
    "svdd": {"policy": "svdd", "eta": 1.0, "keep": "path"},
    "mcts": {"policy": "mcts", "policy_options": {"simulations": 4}, "keep": "leaves"},
    "dts": {"policy": "dts", "policy_options": {"simulations": 4}, "eta": 1.0},
    "budget": {"policy": "best-of-n", "policy_options": {"n": 4}, "nfe": 12},
    "two prompts": {"policy": "best-of-n", "policy_options": {"n": 2}, "prompts": TWO, "steps": 3},
    "adaptive": {"policy": "adaptive", "total_nfe": 40, "prompts": TWO, "steps": 4},
}
IMAGES = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "verifier": "sharpness", "steps": 4, "guidance_scale": 2.0}
OUTCOMES = ("before the record", "searching", "searching, torn", "writing the results", "after the end")


def derived(folder: Path) -> dict[str, bytes]:
    """The files that an interruption must not change, of a run or of all runs of a search."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.name in DERIVED}


def search_of(case: str, folder: Path) -> dict[str, Any]:
    """What a case searches: a case of `GAUSSIAN`, "stable-diffusion" (a tiny random one on disk), or a registered model."""
    common = {"deterministic": True, "max_batch": 4}
    if case in GAUSSIAN:
        return {"model": "gaussian", "prompts": PROMPT, "steps": 5} | GAUSSIAN[case] | common
    if case != "stable-diffusion":
        return {"model": case, "prompts": "a red circle"} | IMAGES | common
    from tiny_sd import tiny_stable_diffusion

    tiny_stable_diffusion(folder / "model")
    return {"model": str(folder / "model"), "prompts": "a red circle"} | IMAGES | common


def forked(work: Callable[[], int | None], errors: Path | None = None) -> int:
    """Start `work` in a process of its own; returns the process's number. Its status is what `work` returns, 70 if that raises."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        if errors is not None:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finished(process: int) -> int:
    """Its exit status; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def command(*words: str) -> int:
    """Run `tsdiff` in this process; returns its exit status."""
    from tsdiff.cli.app import cli

    try:
        cli.main([str(word) for word in words])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


# Kills -----------------------------------------------------------------------------------------------------------------


class Victim:
    """One case: a search that is killed again and again until it is done, then another.

    Args:
      case: its name.
      folder: to work in.
      rng: chooses the moments.
    """

    def __init__(self, case: str, folder: Path, rng: random.Random) -> None:
        self.options = search_of(case, folder)
        self.rng = rng
        self.outcomes: Counter[str] = Counter()
        self.identical = self.lost = 0
        self.whole = folder / "whole"
        self.cut = folder / "cut"
        begun = time.monotonic()
        status = finished(forked(lambda: self.go_on(self.whole)))
        assert status == 0, "the search itself fails"
        self.seconds = time.monotonic() - begun
        self.wanted = derived(self.whole / "run-0001")
        self.journals = [path.relative_to(self.whole) for path in self.whole.rglob("journal.jsonl")]
        self.size = self.written(self.whole)

    def go_on(self, out: Path) -> None:
        """Begin the search, or continue it."""
        import tsdiff

        folder = out / "run-0001"
        if begun(folder):
            tsdiff.resume(folder)
            return
        shutil.rmtree(out, ignore_errors=True)
        tsdiff.search(out=out, **self.options)

    def written(self, out: Path) -> int:
        """Bytes of the journals."""
        return sum((out / path).stat().st_size for path in self.journals if (out / path).exists())

    def strike(self, kills: int) -> None:
        """Kill so many times; what was killed is continued to its end and compared.

        A search that was killed while its results were written is left alone half of the time: what remains of it is so short that it
        would be killed there for ever, and no other would be begun.
        """
        while kills:
            shutil.rmtree(self.cut, ignore_errors=True)
            running, spared = True, False
            while running:
                process = forked(lambda: self.go_on(self.cut))
                if kills and not spared and self.wait(process):
                    os.kill(process, signal.SIGKILL)
                status = finished(process)
                if status == -signal.SIGKILL:
                    kills -= 1
                    phase = self.phase()
                    self.outcomes[phase] += 1
                    spared = phase == "writing the results" and self.rng.random() < 0.5
                else:
                    assert status == 0, "continuing the search has failed"
                    running = False
            assert derived(self.cut / "run-0001") == self.wanted, "the search ends in other bytes"
            self.identical += 1
            self.lost += self.lost_rows()

    def wait(self, process: int) -> bool:
        """Until the moment to kill at, at most until the process has ended."""
        moment = self.rng.random()
        target = self.rng.uniform(self.written(self.cut), self.size) if moment < 0.8 else 0.97 * self.size
        if moment < 0.15:
            time.sleep(self.rng.uniform(0.0, 0.3 * self.seconds))
            return True
        while self.written(self.cut) < target:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0.0, 0.003 if moment < 0.8 else 0.3 * self.seconds))
        return True

    def phase(self) -> str:
        """Where the kill has hit."""
        from tsdiff.treesearch.journal import JournalReader

        folder = self.cut / "run-0001"
        if not begun(folder):
            return "before the record"
        states = [json.loads(path.read_text())["status"] for path in folder.rglob("run.json")]
        if len(states) == len(self.journals) and set(states) == {"done"}:
            return "after the end"
        readers = [JournalReader(self.cut / path) for path in self.journals if (self.cut / path).exists()]
        ends = sum("end" in record for reader in readers for group in reader for record in group.records)
        if any(reader.tail is not None for reader in readers):
            return "searching, torn"
        return "writing the results" if ends == 2 * len(self.journals) else "searching"

    def lost_rows(self) -> int:
        """Network rows that were computed twice, as far as the engine knows."""
        return int(json.loads((self.cut / "run-0001" / "index.json").read_text())["engine"]["lost"])

    def to_json(self) -> dict[str, Any]:
        """What came of it."""
        return {"kills": sum(self.outcomes.values()), "searches": self.identical, "lost rows": self.lost, "outcomes": {name: self.outcomes[name] for name in OUTCOMES}}


def begun(folder: Path) -> bool:
    """Whether a search can be continued."""
    return (folder / "run.json").exists() or (folder / "index.json").exists()


def kills(wanted: dict[str, int], seed: int) -> dict[str, Any]:
    """Kill the searches of several cases so many times each."""
    report = {}
    for case, number in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            victim = Victim(case, Path(folder), random.Random(f"{case} {seed}"))
            victim.strike(number)
            report[case] = victim.to_json()
    return report


# Disks that do not take it ---------------------------------------------------------------------------------------------

BEAM = ("search", "--model", "gaussian", PROMPT, "--policy", "beam", "-P", "width=2", "-P", "branch=2", "--steps", "6", "--deterministic", "--quiet")


def full() -> dict[str, Any]:
    """Search where no file may become larger than a limit; then continue without."""
    from tsdiff.treesearch.journal import JournalReader

    report = {}
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        assert finished(forked(lambda: command(*BEAM, "--out", str(whole)))) == 0
        wanted = derived(whole / "run-0001")
        largest = max(path.stat().st_size for path in whole.rglob("*"))
        for share in (0.02, 0.3, 0.8, 0.999):
            out, errors = Path(name) / str(share), Path(name) / f"{share}.txt"
            limit = int(share * largest)

            def limited(limit: int = limit, out: Path = out) -> int:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                return command(*BEAM, "--out", str(out))

            one: dict[str, Any] = {"status": finished(forked(limited, errors)), "error": errors.read_text()}
            journal = out / "run-0001" / "journal.jsonl"
            one["groups"] = sum(1 for _ in JournalReader(journal)) if journal.exists() else None
            if begun(out / "run-0001"):
                one["resumed"] = finished(forked(lambda out=out: command("resume", str(out / "run-0001"), "--quiet")))
                one["identical"] = derived(out / "run-0001") == wanted
            report[str(share)] = one
    return report


def readonly() -> dict[str, Any]:
    """Continue, and begin, a search in a folder that one may only read."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "runs"
        Path(name).chmod(0o755)
        folder = out / "run-0001"
        # In this process, so that what it imports is there when nothing of the interpreter's may be readable any more.
        with contextlib.redirect_stdout(io.StringIO()):
            assert (command(*BEAM, "--out", str(out)), command("resume", str(folder), "--quiet")) == (0, 0)
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(facts | {"status": "running"}))
        for path in [folder, *folder.rglob("*"), out]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def powerless(*words: str) -> int:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            return command(*words)

        for what, words in {"resume": ("resume", str(folder), "--quiet"), "search": (*BEAM, "--fresh", "--out", str(out))}.items():
            errors = Path(name) / f"{what}.txt"
            report[what] = {"status": finished(forked(lambda words=words: powerless(*words), errors)), "error": errors.read_text()}
        report["unchanged"] = before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for path in (out, folder):
            path.chmod(0o755)
    return report


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kills", "full", "readonly"])
    parser.add_argument("--kills", type=json.loads, default={})
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    import tsdiff.treesearch.resume
    import tsdiff.treesearch.search  # noqa: F401 - so that forked processes have it

    torch.set_num_threads(1)
    print(json.dumps(kills(options.kills, options.seed) if options.what == "kills" else full() if options.what == "full" else readonly()))


if __name__ == "__main__":
    main()
