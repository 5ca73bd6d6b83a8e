"What all tests share: quiet, offline, and switches for the slow ones."

import os
from pathlib import Path

import pytest

import rvos_nb  # noqa: F401  before torch, for what it sets in the environment

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IN_TEST"] = "1"
FLAGS = set(os.environ.get("RVOS_FLAGS", "").split())


def pytest_collection_modifyitems(items):
    """Tests marked slow or gpu run with RVOS_FLAGS='slow gpu'; those marked browser wherever there
    is one."""
    for item in items:
        for flag in {"slow", "gpu"} - FLAGS:
            if item.get_closest_marker(flag):
                item.add_marker(pytest.mark.skip(reason=f"RVOS_FLAGS={flag} runs it"))


@pytest.fixture
def root() -> Path:
    return ROOT
