"""Where a run computes, in which precision, and from which random numbers."""

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
