"""The viewer's page: how soon a large tree is there, how smoothly it moves, and how much a browser has to fetch.

    python benchmarks/viewer.py [--json] [--save] [--sizes 100 1000 10000]

Trees are made up: rounds of re-noising and denoising with survivors, small pictures that are inherited with changes, scores
that rise on the way. They are written as run folders and served by `tsdiff view`'s own server to a headless Chromium that
draws without a GPU. First paint is from the beginning of the navigation to the first frame with the tree; a frame is from
one animation frame to the next while the tree is dragged, all of it unfolded and in view (the worst case) and close up.
`--save` writes screenshots into docs/images.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tsdiff.treesearch.disk import LOCAL
from tsdiff.treesearch.previewfile import PREVIEWS, PreviewFile, compress
from tsdiff.treesearch.saved import load_run
from tsdiff.viewer.app import make_app
from tsdiff.viewer.folders import Folders
from tsdiff.viewer.html import write_html
from tsdiff.viewer.library import Library
from tsdiff.viewer.server import listen, make_server

GOALS = {"first_paint_seconds": 2.0, "frame_milliseconds": 50.0}
IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEPS, VERIFIER = 20, "agreement"
PICTURES = 1024
"""Different pictures of a tree; beyond, they are used again."""

SIDE = 64
FRAMES = 60
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


# Trees ---------------------------------------------------------------------------------------------------------------


def made_up(count: int) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Nodes of a tree as `tree.json` has them, and what each one's picture shows: seven numbers that children inherit."""
    numbers = random.Random(count)
    noise = np.random.default_rng(count)
    nodes: list[dict[str, Any]] = []
    looks: list[np.ndarray] = []
    rounds, branch = (4, 8, 12, 16), 4
    keep = max(2, int(count * 0.92 / (1 + len(rounds) * (2 * branch + 1))))  # the rest are samples

    def add(parent: int | None, level: int, kind: str, look: np.ndarray, score: float | None) -> int:
        index = len(nodes)
        values = {} if score is None else {VERIFIER: {"score": score}}
        move = {"kind": kind, "levels": [level] if parent is None else [nodes[parent]["level"], level], "copy": 0}
        nodes.append({"index": index, "id": f"{index + 1:032x}", "stream": f"{1:032x}", "parent": parent, "move": move, "level": level, "nfe": 4 if kind == "denoise" else 0, "values": values, "status": "closed", "reason": None, "draft": False, "note": {}})  # fmt: skip
        looks.append(look)
        return index

    def judged(look: np.ndarray, level: int) -> float:
        return round(float(1 - np.abs(look - 0.62).mean() * 2.2 + noise.normal(0, 0.02)) - 0.1 * (1 - level / STEPS), 5)

    alive = [add(None, 0, "draw", noise.random(7), None) for _ in range(keep)]
    alive = [add(one, rounds[0], "denoise", looks[one], judged(looks[one], rounds[0])) for one in alive]
    for place, level in enumerate(rounds):
        born = []
        for one in alive:
            for _ in range(numbers.choice((branch - 1, branch, branch + 1))):
                look = np.clip(looks[one] + noise.normal(0, 0.2 * (1 - level / STEPS) + 0.03, 7), 0, 1)
                back = add(one, level - 4, "renoise", look, None)
                born.append(add(back, level, "denoise", look, judged(look, level)))
        born.sort(key=lambda one: -nodes[one]["values"][VERIFIER]["score"] + numbers.gauss(0, 0.05))
        alive = born[:keep]
        if place + 1 < len(rounds):
            alive = [add(one, rounds[place + 1], "denoise", looks[one], judged(looks[one], rounds[place + 1])) for one in alive]
    while len(nodes) < count:
        one = alive[numbers.randrange(len(alive))]
        look = np.clip(looks[one] + noise.normal(0, 0.03, 7), 0, 1)
        add(one, STEPS, "denoise", look, judged(look, STEPS))
    return nodes[:count], looks[:count]


def landscape(look: np.ndarray, level: int) -> np.ndarray:
    """A sun over hills, as blurred as a clean estimate at a level is."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    warm = np.array([0.95, 0.55 + 0.3 * look[1], 0.35 + 0.35 * look[2]])
    cool = np.array([0.15 + 0.4 * look[0], 0.35 + 0.3 * look[1], 0.75])
    sky = cool + (y[..., None] * 1.3).clip(0, 1) * (warm - cool)
    sun = np.exp(-(((x - look[3]) ** 2 + (y - 0.18 - 0.3 * look[4]) ** 2) / (0.004 + 0.012 * look[5])))
    image = sky + sun[..., None] * (np.array([1.0, 0.95, 0.75]) - sky)
    for depth in range(3):
        ridge = 0.5 + 0.15 * depth + 0.09 * np.sin(2 * np.pi * (x * (1 + depth + look[6]) + look[depth])) * (1 - 0.2 * depth)
        hill = np.array([0.25 + 0.4 * look[depth], 0.3 + 0.3 * look[6], 0.4 + 0.3 * look[4]]) * (1 - 0.25 * depth)
        image = np.where((y > ridge)[..., None], hill, image)
    pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    coarse = max(5, int(SIDE * (0.08 + 0.92 * (level / STEPS) ** 1.6)))
    picture = Image.fromarray(pixels).resize((coarse, coarse), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def write_run(folder: Path, count: int) -> Path:
    """A run folder with such a tree."""
    nodes, looks = made_up(count)
    folder.mkdir(parents=True)
    sigma = [1 - level / STEPS for level in range(STEPS + 1)]
    tree = {
        "prompt": "a low sun over three ridges", "negative_prompt": "", "class": None, "seed": 7, "line": "search", "verifier": VERIFIER, "solver": "ddim",
        "schedule": {"kind": "ddim", "key": "0" * 16, "timesteps": sigma[:-1], "alpha": [1 - one for one in sigma], "sigma": sigma},
    }  # fmt: skip
    finished = [one for one in nodes if one["level"] == STEPS]
    best = max(finished, key=lambda one: one["values"][VERIFIER]["score"])
    nfe = sum(one["nfe"] for one in nodes)
    calls = {VERIFIER: sum(bool(one["values"]) for one in nodes)}
    spent = {"nfe": nfe, "rows": nfe, "decodes": 0, "verifier_calls": calls}
    result = {"verifier": VERIFIER, "node": best["index"], "score": best["values"][VERIFIER]["score"], "image": None, "nodes": count, "seconds": 1.0, **spent}
    options = {"model": "made-up", "policy": {"name": "beam"}, "verifiers": [VERIFIER], "solver": "ddim", "steps": STEPS}
    run = {"format": 1, "status": "done", "prompt": tree["prompt"], "seed": 7, "arguments": {}, "options": options, "tree": tree, "result": result}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "tree.json").write_text(json.dumps({"format": 1, **tree, "ledger": {"encodes": 0, **spent}, "notes": [], "nodes": nodes}))
    pictures: dict[tuple[int, int], tuple[bytes, str]] = {}
    file = PreviewFile(folder / PREVIEWS, LOCAL)
    for index, one in enumerate(nodes):
        if not one["values"]:
            continue
        key = (index % PICTURES, one["level"] if index < PICTURES else STEPS)
        if key not in pictures:
            pictures[key] = compress(landscape(looks[index], key[1]))
        data, kind = pictures[key]
        file.append({"tree": "search", "node": index, "id": one["id"], "media_type": kind, "width": SIDE, "height": SIDE}, data)
    file.close()
    return folder


# Measuring -----------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A viewer of a folder; its address."""
    with listen(0) as opened:
        port = opened.getsockname()[1]
        server = make_server(make_app(Library(Folders(folder)), port=port, token="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join(10)


DRAG = """async (frames) => {
  const canvas = document.getElementById("tree"), box = canvas.getBoundingClientRect();
  const send = (kind, x, y) => canvas.dispatchEvent(new PointerEvent(kind, {pointerId: 1, clientX: box.x + x, clientY: box.y + y, bubbles: true}));
  canvas.setPointerCapture = () => {};
  const frame = () => new Promise(requestAnimationFrame);
  send("pointerdown", 400, 200);
  const times = [];
  let last = await frame();
  for (let at = 0; at < frames; at += 1) {
    send("pointermove", 400 + 60 * Math.sin(at / 6), 200 + 30 * Math.sin(at / 4));
    const now = await frame();
    times.push(now - last);
    last = now;
  }
  send("pointerup", 400, 200);
  return times;
}"""


def until(page: Any, expression: str, seconds: float = 60.0) -> None:
    """Wait until an expression is true in the page."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({expression})"):
        if time.monotonic() > deadline:
            raise SystemExit(f"the page did not come to {expression}")
        time.sleep(0.05)


def measured(browser: Any, folder: Path, repeats: int, picture: Path | None) -> dict[str, Any]:
    """Figures of one tree; and a screenshot of it."""
    found: dict[str, Any] = {}
    with served(folder) as address:
        paints, sizes = [], []
        for _ in range(repeats + 1):
            context = browser.new_context(viewport={"width": 1360, "height": 820})
            page = context.new_page()
            page.goto(address)
            until(page, "performance.getEntriesByName('tsdiff-painted').length")
            paints.append(page.evaluate("performance.getEntriesByName('tsdiff-painted')[0].startTime") / 1000)
            sizes.append(page.evaluate("performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation')).reduce((sum, one) => sum + one.transferSize, 0)"))
            if len(paints) <= repeats:
                context.close()
        found["first_paint_seconds"] = round(statistics.median(paints[1:]), 3)  # the first also reads the tree from disk
        found["first_paint_cold_seconds"] = round(paints[0], 3)
        found["fetched_bytes"] = sizes[-1]
        time.sleep(1.5)
        if picture is not None:
            page.evaluate("tsdiffPage.choose(tsdiffPage.state.tree.best)")
            time.sleep(1.5)
            save(page.screenshot(), picture)
        if page.evaluate("tsdiffPage.state.fold"):
            page.keyboard.press("w")
        page.keyboard.press("f")
        time.sleep(1.0)
        found["frame_milliseconds"] = told(page.evaluate(DRAG, FRAMES))
        page.keyboard.press("b")
        for _ in range(3):
            page.keyboard.press("+")
        time.sleep(2.0)
        found["frame_close_milliseconds"] = told(page.evaluate(DRAG, FRAMES))
        context.close()
    write_html(load_run(folder), folder.parent / f"{folder.name}.html")
    found["html_bytes"] = (folder.parent / f"{folder.name}.html").stat().st_size
    return found


def told(times: list[float]) -> dict[str, float]:
    """The middle and the slow frames."""
    ordered = sorted(times)
    return {"median": round(statistics.median(ordered), 1), "p95": round(ordered[int(len(ordered) * 0.95)], 1)}


def save(screenshot: bytes, path: Path) -> None:
    """A screenshot as a small PNG."""
    with Image.open(io.BytesIO(screenshot)) as opened:
        opened.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="The viewer's page with large trees.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--save", action="store_true", help="write screenshots into docs/images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000], help="nodes of the trees")
    parser.add_argument("--repeats", type=int, default=3, help="how often each page is opened")
    options = parser.parse_args()
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit("this needs chromium; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    static = Path(sys.modules["tsdiff.viewer.html"].__file__ or "").parent / "static"
    report: dict[str, Any] = {
        "machine": platform.platform(), "python": platform.python_version(), "goals": GOALS,
        "page_bytes": sum(path.stat().st_size for path in static.rglob("*") if path.is_file()), "trees": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        report["browser"] = browser.version
        for size in options.sizes:
            run = write_run(Path(folder) / str(size) / f"tree-{size}", size)
            report["trees"][size] = measured(browser, run, options.repeats, IMAGES / f"viewer-{size}.png" if options.save else None)
        browser.close()
    if options.json:
        print(json.dumps(report))
        return
    print(f"Chromium {report['browser']} without a GPU; the page itself {report['page_bytes'] / 1e3:.0f} kB")
    for size, found in report["trees"].items():
        frame, close = found["frame_milliseconds"], found["frame_close_milliseconds"]
        print(
            f"{size:>6} nodes  first paint {found['first_paint_seconds']:.2f} s (cold {found['first_paint_cold_seconds']:.2f})  frame {frame['median']:.0f} ms, p95 {frame['p95']:.0f}"
            f"  close up {close['median']:.0f} ms, p95 {close['p95']:.0f}  fetched {found['fetched_bytes'] / 1e3:.0f} kB  as one file {found['html_bytes'] / 1e6:.2f} MB"
        )
    print(f"goals at 10,000: first paint {GOALS['first_paint_seconds']:g} s, frame {GOALS['frame_milliseconds']:g} ms")


if __name__ == "__main__":
    main()
