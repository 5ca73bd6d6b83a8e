"What all tests share: quiet, offline, and switches for the slow ones."

import ctypes
import gc
import os
import sys
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


LARGE = 1.5  # GB that a process may hold before it is asked to give back what it does not use


@pytest.fixture(autouse=True)
def give_memory_back():
    "glibc keeps what models of full size have left; two processes share the machine."
    yield
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > LARGE * 1e9:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
