"""What results of the native kernels hold for: this build of them, with this torch and driver, on this device."""

from __future__ import annotations

import hashlib
from functools import cache

import torch

from ..util.cache import cache_folder, name_of
from . import native


@cache
def facts(device: str) -> dict[str, object]:
    """All that decides which kernels run on a device, and how."""
    about: dict[str, object] = {"extension": _hash(), "torch": torch.__version__, "driver": native.driver()}
    if device.startswith("cuda"):
        found = torch.cuda.get_device_properties(device)
        about |= {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "sms": found.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        about["device"] = device
    return about


def folder(device: str):
    """Where results for a device are kept: another folder for every other build, torch, driver and device."""
    return cache_folder() / name_of(facts(device))


@cache
def _hash() -> str:
    return hashlib.sha256(native.LIBRARY.read_bytes()).hexdigest() if native.LIBRARY.exists() else "none"
