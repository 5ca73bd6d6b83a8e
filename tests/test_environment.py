"What importing the package sets before PyTorch starts: in scripts, kernels and children."

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from rvos_nb import ENVIRONMENT, TOO_LATE

ROOT = Path(__file__).resolve().parents[1]
SHOW = "import json, os; print(json.dumps({n: os.environ.get(n) for n in rvos_nb.ENVIRONMENT}))"


def python(code, *argv, **own):
    "What a fresh Python prints that has of our settings only `own`."
    env = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env={**env, "PYTHONPATH": str(ROOT), **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def doctor(code="", **own):
    "The rows of `rvos doctor`, after some code."
    said = python(f"{code}\nfrom rvos_nb.cli import main; main(['doctor'])", **own)
    return dict(line.split(None, 1) for line in said.splitlines() if line.split()[0] in ENVIRONMENT)


def test_set_before_torch_starts():
    assert not TOO_LATE, "tests/conftest.py imports rvos_nb before torch"
    assert json.loads(python(f"import rvos_nb, torch; {SHOW}")) == ENVIRONMENT
    assert json.loads(python(f"import rvos_nb.data.masks, torch, rvos_nb; {SHOW}")) == ENVIRONMENT
    assert all("before torch started" in said for said in doctor().values())


def test_a_value_of_the_users_own_wins():
    found = json.loads(python(f"import rvos_nb; {SHOW}", MKL_CBWR="COMPATIBLE"))
    assert found == ENVIRONMENT | {"MKL_CBWR": "COMPATIBLE"}
    said = doctor(MKL_CBWR="COMPATIBLE")
    assert said["MKL_CBWR"].startswith("COMPATIBLE, from outside")
    assert "before torch started" in said["OMP_WAIT_POLICY"]


def test_torch_first_is_too_late():
    said = doctor("import torch", OMP_WAIT_POLICY="PASSIVE")
    assert "too late" in said["MKL_CBWR"] and "before torch started" in said["OMP_WAIT_POLICY"]


WORKERS = """
import json, os
from rvos_nb.units import map_units

def note(unit):
    found = {name: os.environ.get(name) for name in ("MKL_CBWR", "OMP_WAIT_POLICY")}
    open(unit, "w").write(json.dumps(found))

if __name__ == "__main__":
    import sys
    assert [error for _, error in map_units(note, sys.argv[1:], "processes:2")] == [None, None]
"""


def test_worker_processes_inherit(tmp_path):
    "Workers are started afresh (`spawn`), from a file as a user's script is."
    script, files = tmp_path / "script.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(WORKERS)
    python(
        "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')", script, *files
    )
    assert [json.loads(path.read_text()) for path in files] == [ENVIRONMENT] * 2


@pytest.mark.parametrize(
    "start",
    [
        "import rvos_nb, papermill; papermill.execute_notebook(*argv, progress_bar=False)",
        "from rvos_nb.pipeline import run_part; run_part(*argv, {})",
        "from rvos_nb.pipeline import run_workflow; run_workflow({'name': 'a', 'parameters': {'out': argv[1] + 's'},"
        " 'paths': ['out'], 'stages': [{'name': 'a', 'notebook': argv[0]}]})",
    ],
    ids=["papermill", "run part", "pipeline"],
)
def test_kernels_inherit(start, tmp_path):
    "A notebook that imports torch first has them too where papermill or the pipeline runs it."
    note = f"open({str(tmp_path / 'note')!r}, 'w').write(json.dumps(dict(os.environ)))"
    cells = [
        nbformat.v4.new_code_cell("import torch\nimport json, os"),
        nbformat.v4.new_code_cell("size: int = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"import torch, json, os\n{note}"),
    ]
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, tmp_path / "a.ipynb")
    python(f"import sys; argv = sys.argv[1:]; {start}", tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    found = json.loads((tmp_path / "note").read_text())
    assert {name: found.get(name) for name in ENVIRONMENT} == ENVIRONMENT
