"""The machine that the extension's host code runs on in a rehearsal: csrc/rehearsal/machine.h, by ctypes."""

from __future__ import annotations

import ctypes
import os

INVALID_VALUE, OUT_OF_MEMORY, NO_IMAGE, OUT_OF_RESOURCES, ILLEGAL_ADDRESS = 1, 2, 209, 701, 700


# Of every process, in this order: the extension asks a device for its properties once.
GPUS = ("h200", "h200", "a100", "l40s", "b200")


class Machine:
    """The GPUs of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["SHRANK_TEST_LIBRARY"])
        self._library.rehearsal_log.restype = ctypes.c_char_p

    def reset(self) -> None:
        """As new, but for what kernels were allowed; tensors are on the first GPU."""
        self._library.rehearsal_reset(",".join(GPUS).encode())

    def put_tensors_on(self, device: int) -> None:
        self._library.rehearsal_put_tensors_on(device)

    @property
    def current_device(self) -> int:
        return self._library.rehearsal_current_device()

    def use_stream(self, device: int, number: int) -> None:
        """Make another stream of a device its current one: 0, the default, to 2."""
        self._library.rehearsal_use_stream(device, number)

    def capture(self, on: bool = True) -> None:
        self._library.rehearsal_capture(on)

    def fail(self, function: str, error: int, calls: int = 1, before: int = 0) -> None:
        """Let calls of a function of the runtime fail, after `before` that go well."""
        self._library.rehearsal_fail(function.encode(), error, calls, before)

    def leave_error(self, error: int) -> None:
        """As if somebody else's call had failed, and nobody had asked."""
        self._library.rehearsal_leave_error(error)

    @property
    def last_error(self) -> int:
        return self._library.rehearsal_last_error()

    @property
    def log(self) -> list[str]:
        """Launches, opt-ins and failures since the last reset or clear."""
        count = self._library.rehearsal_log_length()
        return [self._library.rehearsal_log(i).decode() for i in range(count)]

    def clear_log(self) -> None:
        self._library.rehearsal_clear_log()

    @property
    def launches(self) -> list[str]:
        return [line for line in self.log if line.startswith("launch ")]
