"""Silence for the libraries below: their progress bars and warnings are not addressed to our users."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tsdiff.treesearch.imports import prepare_torchvision


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no messages below errors from diffusers, transformers and huggingface_hub; restored after."""
    prepare_torchvision()
    import transformers.utils.logging as transformers_logging
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosities = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    hub_bars = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in verbosities:
                library.set_verbosity_error()
            for library in bars:
                library.disable_progress_bar()
            disable_progress_bars()
            yield
        finally:
            for library, level in verbosities:
                library.set_verbosity(level)
            for library in bars:
                library.enable_progress_bar()
            # Last, because transformers switches the hub's bars together with its own.
            (enable_progress_bars if hub_bars else disable_progress_bars)()
