"""How fast images are scored: as tensors in batches, against one PIL image a call, on the CLIP of the shapes world.

    python benchmarks/verifiers.py [--json] [--rounds N] [--save docs/results]
    python benchmarks/verifiers.py --model FOLDER --size 512 --device cuda

The batched path is a search's own: pictures stay tensors, 16 in a call, each prompt is encoded once. The other is the
loop of many papers' scripts, with open_clip's own transform and tokenizer: to an 8-bit PIL image, through the transform,
one image and its prompt through the network. A second loop encodes each prompt once, to tell what is due to images.
Both use the same weights on the same device and threads; rounds of all paths alternate, so that a machine that changes
its speed does so for all, and medians are reported. Speed does not depend on weights: where the embedded model is not
there, one of its architecture with random weights stands in, and the report says so.

Key: `batched_over_single`, seconds of the loop over seconds of the batched path; the goal is 3. `processor` has the same
ratio in processor time, which means something on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsdiff.treesearch.pictures import picture_device, score_pictures
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.results import to_pil
from tsdiff.verifiers.libraries import quiet_libraries
from tsdiff.worlds.shapes.model import MODELS
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import training_example

GOAL = 3.0
BATCH = 16
PROMPTS = 8
EMBEDDED = MODELS / "shapes-clip"


def model_folder(given: Path | None, stack: ExitStack) -> tuple[Path, str]:
    """The model to measure, and what it is."""
    if given is not None:
        return given, str(given)
    if (EMBEDDED / "open_clip_config.json").is_file():
        return EMBEDDED, "shapes-clip"
    from tsdiff.worlds.shapes.train.contrast import Contrast
    from tsdiff.worlds.shapes.train.loop import Training

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    task = Contrast("random", Training(steps=1, batch=2, rate=0.0))
    torch.manual_seed(0)
    task.export(task.build(), folder)
    return folder, "the architecture of shapes-clip with random weights"


def pictures(count: int, size: int) -> tuple[Tensor, list[str]]:
    """Drawn scenes (count, 3, size, size), as a decoder would give them, and a caption for each, `PROMPTS` different ones."""
    captions, scenes = zip(*(training_example(0, number) for number in range(count)), strict=True)
    drawn = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1).float() for scene in scenes])
    if drawn.shape[-1] != size:
        drawn = torch.nn.functional.interpolate(drawn, (size, size), mode="bilinear")
    return drawn.contiguous(), [captions[number % PROMPTS] for number in range(count)]


class Scripts:
    """The loop of papers' scripts: open_clip's own functions, one image a call."""

    def __init__(self, folder: Path, device: str) -> None:
        with quiet_libraries():
            import open_clip

            self.model, _, self.transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval()
        self.device = device
        self.texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """Feature (1, d) of a prompt."""
        return torch.nn.functional.normalize(self.model.encode_text(self.tokenizer([prompt]).to(self.device)), dim=-1)

    @torch.no_grad()
    def one(self, picture: Tensor, text: Tensor) -> float:
        """Cosine of one picture with a text feature."""
        pixels = self.transform(to_pil(picture)).unsqueeze(0).to(self.device)
        image = torch.nn.functional.normalize(self.model.encode_image(pixels), dim=-1)
        return float((image * text).sum())

    def all(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Everything anew for each image."""
        return [self.one(picture, self.text(prompt)) for picture, prompt in zip(images, prompts, strict=True)]

    def remembering(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """The same, with each prompt encoded once."""
        for prompt in prompts:
            if prompt not in self.texts:
                self.texts[prompt] = self.text(prompt)
        return [self.one(picture, self.texts[prompt]) for picture, prompt in zip(images, prompts, strict=True)]


def seconds(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall time and processor time of a call, its device drained."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started, used = time.perf_counter(), time.process_time()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Batched tensors against one PIL image a call.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--model", type=Path, help="a folder in open_clip's layout; the embedded shapes-clip by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write verifiers.json")
    options = parser.parse_args()
    device = picture_device(options.device)
    with ExitStack() as stack:
        folder, what = model_folder(options.model, stack)
        verifier: Any = resolve_verifier(f"clip:model={folder}")
        verifier.prepare(device)
        scripts = Scripts(folder, device)
        images, prompts = pictures(options.images, options.size)
        images = images.to(device)
        report = measure(verifier, scripts, images, prompts, device, options.rounds, what)
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "verifiers.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.json:
        print(json.dumps(report))
    else:
        show(report)


def measure(verifier: Any, scripts: Scripts, images: Tensor, prompts: list[str], device: str, rounds: int, what: str) -> dict[str, Any]:
    """Medians of alternating rounds, and whether all paths agree."""
    conditions = [Condition(prompt) for prompt in prompts]
    rows = list(images.unbind())
    network = verifier.network

    def batched() -> list[float]:
        values = score_pictures([verifier], rows, conditions, device=device, rows=BATCH)
        return [float(value[verifier.name].score or 0.0) for value in values]

    def forgetful() -> list[float]:
        """As `batched`, but each batch encodes its prompts anew."""
        found: list[float] = []
        for start in range(0, len(rows), BATCH):
            network._texts.clear()
            values = score_pictures([verifier], rows[start : start + BATCH], conditions[start : start + BATCH], device=device, rows=BATCH)
            found += [float(value[verifier.name].score or 0.0) for value in values]
        return found

    def encode(texts: Sequence[str]) -> None:
        network._texts.clear()
        network.text_features(texts)

    different = [f"{prompts[0]} {number}" for number in range(len(prompts))]
    paths: dict[str, Callable[[], Any]] = {
        "batched": batched,
        "single": lambda: scripts.all(images, prompts),
        "single_texts_once": lambda: scripts.remembering(images, prompts),
        "batched_texts_forgotten": forgetful,
        "texts_of_one_prompt": lambda: encode(prompts[:1] * len(prompts)),
        "texts_all_different": lambda: encode(different),
    }
    first = {name: call() for name, call in paths.items()}  # loads, allocates, picks kernels
    gap = max(abs(ours - theirs) for ours, theirs in zip(first["batched"], first["single"], strict=True))
    encoded = count_encodings(network, batched)
    batched()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, call in paths.items():
            if name == "batched":
                network.text_features(prompts)  # what other paths have made it forget
            times[name].append(seconds(call, device))
    median = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    used = {name: statistics.median(busy for _, busy in values) for name, values in times.items()}
    return {
        "machine": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "model": what,
        "images": len(images),
        "size": list(images.shape[-2:]),
        "prompts": len(set(prompts)),
        "rows_per_call": BATCH,
        "rounds": rounds,
        "goal": GOAL,
        "batched_over_single": round(median["single"] / median["batched"], 3),
        "processor": round(used["single"] / used["batched"], 3) if device == "cpu" else None,
        "batched_over_single_texts_once": round(median["single_texts_once"] / median["batched"], 3),
        "texts_kept_over_forgotten": round(median["batched_texts_forgotten"] / median["batched"], 3),
        "one_prompt_over_all_different": round(median["texts_all_different"] / median["texts_of_one_prompt"], 3),
        "prompts_encoded": encoded,
        "largest_difference": gap,
        "seconds": {name: {"median": round(median[name], 5), "min": round(min(values)[0], 5), "processor": round(used[name], 5)} for name, values in times.items()},
        "images_per_second": {name: round(len(images) / median[name], 1) for name in ("batched", "single", "single_texts_once")},
    }


def count_encodings(network: Any, call: Callable[[], Any]) -> int:
    """How many prompts a call makes the text tower read, from nothing."""
    seen: list[int] = []
    words = next(module for module in network.towers.module.modules() if isinstance(module, torch.nn.Embedding))
    hook = words.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    network._texts.clear()
    call()
    hook.remove()
    return sum(seen)


def show(report: dict[str, Any]) -> None:
    """For people."""
    print(f"{report['model']}, {report['images']} images of {report['size'][0]} x {report['size'][1]}, {report['prompts']} prompts, {report['device']}, {report['threads']} threads")
    for name, value in report["seconds"].items():
        print(f"{name:24} median {1000 * value['median']:9.1f} ms   min {1000 * value['min']:9.1f} ms")
    busy = "" if report["processor"] is None else f"   in processor time {report['processor']:.2f}"
    print(f"batched over single            {report['batched_over_single']:.2f}   goal {report['goal']:.0f}{busy}")
    print(f"  where both keep text features {report['batched_over_single_texts_once']:.2f}")
    print(f"text features kept over forgotten {report['texts_kept_over_forgotten']:.2f}")
    print(f"one prompt over as many different ones {report['one_prompt_over_all_different']:.2f}; prompts encoded: {report['prompts_encoded']}")
    print(f"largest difference of a score {report['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
