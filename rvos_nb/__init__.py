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
