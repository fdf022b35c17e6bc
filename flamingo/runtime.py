"""How a process uses the machine it is on. Knows no other room."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Processes side by side on this machine: one per GPU; without one, two if there are two cores."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else min(2, cores())


@contextlib.contextmanager
def at_rest(module: torch.nn.Module) -> Iterator[None]:
    """Within this `with` a module is in eval mode, also one that is being trained."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()


def tune_cpu(processes: int = 1) -> None:
    """Share the cores among `processes` on this machine, and keep freed memory."""
    name_accelerator()
    share_cores(processes)
    keep_freed_memory()


def share_cores(processes: int = 1) -> None:
    """Threads of torch: this process's share of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // processes))


def keep_freed_memory() -> None:
    """In this process, for what is allocated next: glibc gives large blocks back to the system when freed
    and maps fresh, zeroed pages, which in virtual machines is half of a convolutional encoder's time."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
            mallopt(mmap_threshold, 1 << 30)
            mallopt(trim_threshold, (1 << 31) - 1)
            mallopt(top_pad, 256 << 20)


def recurring(size: int) -> int:
    """`size` rounded up to one of 16 between two powers of two, at most a sixteenth more.

    Steps whose lengths all differ have matrices of ever new sizes, and libraries prepare a product for
    its sizes: oneDNN takes some milliseconds for each, a tenth of a small model's step on a CPU, and
    keeps what it prepared. Sizes that come again are prepared once. float32 on a CPU goes by way of MKL,
    which prepares nothing: there sizes stay as they are.
    """
    if arithmetic() == "float32":
        return size
    step = 1 << max(0, size.bit_length() - 5)
    return -(-size // step) * step


def arithmetic() -> str:
    """`bfloat16`, or `float32` on a machine that has no products of bfloat16: torch does them one number
    after the other there, an eighth as fast as float32 on an EPYC of 2021."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    has = torch.cpu.get_capabilities()
    native = any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's
    return "bfloat16" if native else "float32"


def dtype_of(name: str) -> torch.dtype:
    """`auto`: what this machine computes fast, as `arithmetic` says."""
    import torch

    return getattr(torch, arithmetic() if name == "auto" else name)


def name_accelerator() -> None:
    """Without a GPU, tell DeepSpeed so, which otherwise warns wherever it is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextlib.contextmanager
def short_attention() -> Iterator[None]:
    """On a CPU, attention by plain products: torch's fused kernel is far slower backwards.

    Measured at rows of 9 to 64 tokens in bfloat16: 20 ms a layer against 1 (a fifth of the
    training step). On an accelerator nothing changes.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.is_available():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def quiet_libraries() -> None:
    """Only what concerns the user: libraries' notices and progress bars of small steps off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    name_accelerator()


@contextlib.contextmanager
def logs_from(level: int, *loggers: str) -> Iterator[None]:
    """Loggers (names; "" is the root) say nothing below `level`; afterwards what they said before."""
    held = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
    for logger, _ in held:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in held:
            logger.setLevel(before)
