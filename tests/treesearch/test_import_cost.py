"""`import tsdiff` is instant, and the import of torchvision is prepared where its operators are missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "torchvision", "PIL", "scipy", "networkx")
LIGHT = (
    "tsdiff", "tsdiff.plugin", "tsdiff.policies", "tsdiff.policies.beam", "tsdiff.policies.best_of_n", "tsdiff.verifiers", "tsdiff.verifiers.programmatic",
    "tsdiff.worlds.gaussian.model", "tsdiff.worlds.gaussian.verifiers", "tsdiff.diffusion.solvers", "tsdiff.diffusion.loading", "tsdiff.cli",
    *(f"tsdiff.treesearch.{name}" for name in (
        "protocols", "requests", "schedule", "noise", "node", "tree", "ledger", "parameters", "registry", "errors", "imports", "models", "resolve", "store", "runfolder", "callables",
        "plan", "search", "engine", "results", "saved", "savedtree", "exports",
    )),
)  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_modules_that_must_be_light_import_neither_torch_nor_diffusers():
    loads = python(
        f"import sys, importlib\n"
        f"for name in {LIGHT!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    heavy = [one for one in {HEAVY!r} if one in sys.modules]\n"
        f"    assert not heavy, (name, heavy)\n"
        f"print('light')"
    )
    assert loads == "light"


def test_planning_on_the_analytic_model_imports_no_torch():
    code = (
        "import sys\n"
        "from tsdiff.treesearch.search import prepare\n"
        "plan = prepare('gaussian', 'near (3, 2.4)', policy='beam', nfe=400)\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "print(plan.cost.upper.nfe)"
    )
    assert 300 < int(python(code)) <= 400


def test_the_names_of_the_package_are_found_on_first_use():
    code = (
        "import tsdiff, sys\n"
        "assert set(tsdiff.__all__) <= set(dir(tsdiff))\n"
        "assert issubclass(tsdiff.UsageError, tsdiff.TsdiffError) and 'torch' not in sys.modules\n"
        "for name in tsdiff.__all__: getattr(tsdiff, name)\n"
        "try: tsdiff.nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert "no attribute 'nothing'" in python(code)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_imports_after_the_preparation():
    code = (
        "from tsdiff.treesearch.imports import prepare_torchvision\n"
        "first = prepare_torchvision()\n"
        "assert prepare_torchvision() == first\n"
        "import torchvision, torch\n"
        "from torchvision.transforms import functional\n"
        "print(functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape[-1])"
    )
    assert python(code) == "4"


DECLARED = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: torch.arange(len(dets)), "CPU")
from tsdiff.treesearch.imports import prepare_torchvision
print(prepare_torchvision(), torch.ops.torchvision.nms(torch.zeros(3, 4), torch.zeros(3), 0.5).tolist())
"""


def test_operators_that_exist_are_left_alone():
    assert python(DECLARED) == "False [0, 1, 2]"


MISSING = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else real(name, *rest)
from tsdiff.treesearch.imports import prepare_torchvision
import sys
print(prepare_torchvision(), "torch" in sys.modules)
"""


def test_without_torchvision_there_is_nothing_to_do():
    assert python(MISSING) == "False False"


FAKE = """
import sys, pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "torchvision").mkdir()
(folder / "torchvision" / "__init__.py").write_text("")
(folder / "torchvision" / "_C.so").write_bytes(b"built for another torch")
sys.path.insert(0, str(folder))
import torch
from tsdiff.treesearch.imports import prepare_torchvision
print(prepare_torchvision(), hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
"""


def test_operators_that_cannot_be_loaded_are_declared():
    assert python(FAKE) == "True True True"
