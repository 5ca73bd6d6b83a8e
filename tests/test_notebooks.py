"""Every notebook, cell by cell, against the module that was exported from it:
what is missing from the module shows, and coverage sees the package.
Stage notebooks also run from their parameters cell alone, as a pipeline runs them."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
STAGES = [
    p
    for p in NOTEBOOKS
    if any(
        "parameters" in c["metadata"].get("tags", ()) for c in json.loads(p.read_text())["cells"]
    )
]
FLAGS = {"slow", "gpu", "data"} - set(os.environ.get("RVOS_FLAGS", "").split())
IMPORT = """
import importlib as _importlib
_names = vars(_importlib.import_module("rvos_nb.{}"))
globals().update({{k: v for k, v in _names.items() if not k.startswith("__")}})
"""


def cells(path, from_parameters=False):
    "The code to run: exported cells become one import of the module."
    from nbdev.processors import NBProcessor

    module, seen, begun = path.stem.split("_", 1)[1], False, not from_parameters
    for c in NBProcessor(path, rm_directives=False).nb.cells:
        begun = begun or "parameters" in c["metadata"].get("tags", ())
        if c.cell_type != "code" or not begun:
            continue
        d = c.directives_
        if (
            d.keys() & FLAGS
            or d.get("eval:", [""])[0].lower() == "false"
            or "nbdev_export(" in c.source
        ):
            continue
        if d.keys() & {"export", "exporti", "exports"}:
            if not seen:
                yield c, IMPORT.format(module)
            seen = True
        else:
            yield c, c.source


OWN = re.compile(
    r"(MPL|JUPYTER|JPY|KMP|TRITON|PYDEVD|TF_|TORCH|CUDA_|QT_|LD_LIBRARY_PATH|COLUMNS$|LINES$|PYTEST)"
)  # set by libraries when they are imported


def state():
    "What a notebook must leave as it was."
    import torch

    now = {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "cwd": os.getcwd(),
    }
    return now | {k: v for k, v in os.environ.items() if not OWN.match(k)}


def execute(path, monkeypatch, **kw):
    from execnb.shell import CaptureShell

    monkeypatch.chdir(ROOT / "nbs")
    before, shell = state(), CaptureShell(path)
    for shell._cell_idx, (c, source) in enumerate(cells(path, **kw)):
        shell.run(source)
        if shell.exc:
            pytest.fail(f"{path.name}:\n{c.source}\n{shell.prettytb(fname=path)}", pytrace=False)
    import matplotlib.pyplot as plt

    plt.close("all")
    after = state()
    changed = {
        k: (before.get(k), after.get(k))
        for k in before.keys() | after.keys()
        if before.get(k) != after.get(k)
    }
    assert not changed, f"{path.name} changes the state of the process: {changed}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, monkeypatch):
    execute(path, monkeypatch)


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_run_part_stands_alone(path, monkeypatch):
    execute(path, monkeypatch, from_parameters=True)
