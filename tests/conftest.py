"""What every test relies on: no network, one thread, repeatable examples."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library of the hub is imported

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tsdiff", deadline=None, derandomize=True)
settings.load_profile("tsdiff")
