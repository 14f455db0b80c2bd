"""Restores the state of the process after an API function."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers.utils import logging

from vlm_sft.common.hub_answers import forget_answers


@contextmanager
def restored() -> Iterator[None]:
    """Restore the state of the process when the block ends, however it ends.

    These are environment variables, signal handlers, filters of warnings, what transformers prints, PyTorch's number of
    threads, and the random numbers of Python, NumPy and PyTorch.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()} if main_thread else {}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    forget_answers()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        _put_back(environment)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        torch.set_num_threads(threads)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def _put_back(environment: dict[str, str]) -> None:
    """Make the environment variables what they were."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
