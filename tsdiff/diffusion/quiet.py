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
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging
    from diffusers.utils import logging as diffusers_logging

    verbosities = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in verbosities:
                library.set_verbosity_error()
            for library in bars:
                library.disable_progress_bar()
            hub.disable_progress_bars()
            yield
        finally:
            for library, level in verbosities:
                library.set_verbosity(level)
            for library in bars:
                library.enable_progress_bar()
            # Last, because transformers switches the hub's bars together with its own.
            (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
