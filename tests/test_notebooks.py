"""Every notebook, cell by cell, against the module that was exported from it:
what is missing from the module shows, and coverage sees the package.
The stage of a stage notebook also runs alone, as a pipeline runs it; with parameters given,
papermill skips the lesson."""

import json
import os
import re
from pathlib import Path

import pytest

from rvos_nb.workflow import find_notebook, find_parameters_cell, take_stage_cells

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
STAGES = [p for p in NOTEBOOKS if find_parameters_cell(json.loads(p.read_text())) >= 0]
FLAGS = {"slow", "gpu", "data"} - set(os.environ.get("RVOS_FLAGS", "").split())
IMPORT = """
import importlib as _importlib
_names = vars(_importlib.import_module("rvos_nb.{}"))
globals().update({{k: v for k, v in _names.items() if not k.startswith("__")}})
"""


def cells(path, stage_only=False):
    "The code to run: exported cells become one import of the module."
    from nbdev.processors import NBProcessor

    module, seen = path.stem.split("_", 1)[1], False
    nb = NBProcessor(path, rm_directives=False).nb
    for c in take_stage_cells(nb) if stage_only else nb.cells:
        if c.cell_type != "code":
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
    r"(MPL|JUPYTER|JPY|KMP|TRITON|PYDEVD|TF_|TORCH|CUDA_|QT_|LD_LIBRARY_PATH|COLUMNS$|LINES$"
    r"|PYTEST)"
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
def test_stage_stands_alone(path, monkeypatch):
    execute(path, monkeypatch, stage_only=True)


def run_papermill(notebook, out, parameters):
    "The notebook's code cells as papermill leaves them."
    import nbformat
    import papermill

    papermill.execute_notebook(
        find_notebook(notebook),
        out,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        start_timeout=300,
    )
    return [c for c in nbformat.read(out, 4).cells if c.cell_type == "code"]


def test_papermill_skips_the_lesson_where_parameters_are_given(tmp_path):
    import numpy as np

    from rvos_nb.candidates import save_candidates

    about = {"kind": "logit", "size": [16, 16], "model": "toy", "frames": ["0", "1", "2"]}
    file = tmp_path / "candidates" / "clip" / "0.safetensors"
    save_candidates(file, np.zeros((3, 2, 2)), np.array([0.1, 0.9, 0.2]), np.zeros((3, 4)), about)
    out = tmp_path / "out.ipynb"
    done = run_papermill("keyframe", out, {"pred_dir": str(tmp_path)})
    keys = json.loads((tmp_path / "key_frame.json").read_text())
    assert keys == {"clip": {"0": {"index_info": {"class_index": 1}}}}
    skip = next(i for i, c in enumerate(done) if "skip_lesson()" in c.source)
    assert done[skip].outputs and len(done) > skip + 5
    assert not any(c.outputs for c in done[skip + 1 :])
