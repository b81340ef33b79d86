"""Where a run computes, in which precision, in what memory, and from which random numbers."""

import ctypes
import sys

import torch

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is cuda, else mps, else cpu. ValueError if not there."""
    if name == "auto":
        mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps_or_cpu
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # a device from which nothing comes back is none
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name!r} is not available here: try auto or cpu") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed the random numbers of PyTorch, for the first weights of a model and for dropout."""
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Keep what is freed for the next step, instead of handing it back to the system.

    Linux gives memory back page by page, which costs a tenth of a training step on a processor.
    For the whole process, hence for a command line and not for a library; elsewhere nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of the GNU C library
        if mallopt is not None:
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: at no size
            mallopt(-4, 0)  # M_MMAP_MAX: nothing has a mapping of its own, given back when freed
