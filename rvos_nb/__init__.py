"""Referring video object segmentation: a sentence and a video in, masks of what it means out.

Importing this package, or any module of it, sets what PyTorch's libraries read from the environment
once, when they start. Import it before torch. What a user has set stays. Child processes inherit it.
"""

__version__ = "0.1.0"

import os
import sys

ENVIRONMENT = {
    "MKL_CBWR": "AUTO,STRICT",  # the same bits wherever in memory the operands of a product lie
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for each other sleep instead of spinning
}
TOO_LATE = [name for name in ENVIRONMENT if "torch" in sys.modules and name not in os.environ]

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

LAZY = {
    "segment": "rvos_nb.segmentation",
    "open_result": "rvos_nb.clip_result",
    "ClipResult": "rvos_nb.clip_result",
}  # what is imported from the package itself -> its module, which is loaded only then


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
