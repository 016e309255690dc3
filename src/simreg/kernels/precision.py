"""Matrix products of float32 in float32, whatever the program has allowed for its own."""

import threading
from typing import Any

import torch

_backends: Any = torch.backends
# What says how precise products are, and what it inherits from where it says "none".
_SWITCHES = (
    (_backends.cuda.matmul, _backends.cudnn),
    (_backends.mkldnn.matmul, _backends.mkldnn),
)


class WholeProducts:
    """A context in which float32 products are not reduced (to TF32, bfloat16).

    The switches are the process's, threads are not: the first that enters turns them, the last
    that leaves turns them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [
                    (switch, "none" if parent.fp32_precision == allowed else allowed)
                    for switch, parent in _SWITCHES
                    if (allowed := switch.fp32_precision) not in ("none", "ieee")
                ]
                for switch, _ in self._before:
                    switch.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for switch, precision in self._before:
                    switch.fp32_precision = precision


whole_products = WholeProducts()
