"""Where networks run: the CPU or a GPU, what memory is free there, and how exact it computes."""

__all__ = ["chosen_device", "free_bytes", "full_precision", "same_to_rounding", "training_device"]

import os
from contextlib import AbstractContextManager

import torch

from difficulty.errors import InputError, first_line


def chosen_device(name: str) -> str:
    """cuda or cpu for auto; raises InputError for a device that torch cannot use."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error).partition(". ")[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); choose cpu, cuda or auto") from None
    return name


def training_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def full_precision() -> AbstractContextManager[None]:
    """A context in which a GPU's convolutions keep the digits of float32 and the order of their sums.

    By default they round their inputs to 10 bits (TF32), and may choose another algorithm each time.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def same_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs of a network for the same rows differ by no more than another order of sums makes them."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
