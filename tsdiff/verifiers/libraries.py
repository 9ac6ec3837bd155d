"""Imports of transformers and open_clip without a word of theirs reaching the user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tsdiff.treesearch.imports import prepare_torchvision


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, warnings or log lines of transformers, huggingface_hub and open_clip; all restored after."""
    prepare_torchvision()
    import transformers.utils.logging as library
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, bars, hub_bars = library.get_verbosity(), library.is_progress_bar_enabled(), not are_progress_bars_disabled()
    # open_clip and timm log to the root logger, which equips itself with a printing handler if it has none.
    root, silent = logging.getLogger(), logging.NullHandler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.addHandler(silent)
        library.set_verbosity_error()
        library.disable_progress_bar()
        disable_progress_bars()
        try:
            yield
        finally:
            root.removeHandler(silent)
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
            # Last, because transformers switches the hub's bars together with its own.
            (enable_progress_bars if hub_bars else disable_progress_bars)()
