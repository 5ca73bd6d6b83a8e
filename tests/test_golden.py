"""Every golden case that the repository holds, through the same code as `rvos verify`."""

import gc
from pathlib import Path

import pytest

from rvos_nb.verify.cases import find_cases, judge

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", find_cases([GOLDEN]), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path):
    verdict = judge(path)
    gc.collect()
    assert verdict.ok, str(verdict)


def test_there_are_cases():
    assert len(find_cases([GOLDEN])) >= 10
