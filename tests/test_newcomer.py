"""What a newcomer stumbled over, each with a test: silence, slow starts, a plan that wanted
everything first, a report that did not say why."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rvos_nb import core
from rvos_nb.cli import main
from rvos_nb.core import PROGRESS_LINE
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import write_mask
from rvos_nb.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SIZE = (48, 72)


def rvos(*argv):
    "A command that succeeds."
    with pytest.raises(SystemExit) as e:
        main([str(word) for word in argv])
    assert not e.value.code


# Starting


def imported_by(*argv) -> set[str]:
    "The modules that a command imports, from its beginning to its end."
    code = "from rvos_nb.cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}


def test_listing_models_starts_no_pytorch():
    assert not imported_by("models") & {"torch", "transformers", "matplotlib", "cv2"}


def test_the_doctor_speaks_before_pytorch_starts():
    code = """
import sys
from rvos_nb import cli
for name, value in cli.describe_installation():
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_version_is_told(capsys):
    import rvos_nb

    rvos("--version")
    assert capsys.readouterr().out == f"rvos_nb {rvos_nb.__version__}\n"


# Waiting


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    refshapes.write(root, "valid", "easy", videos=2, seed=4, frames=3, size=SIZE)
    return root


def test_stages_tell_how_long_they_take_without_a_terminal(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RVOS_PROGRESS", "0")
    rvos("predict", "--data", data, "--out", tmp_path / "a")
    rvos("keyframe", tmp_path / "a")
    rvos("propagate", data, tmp_path / "a", "--out", tmp_path / "b")
    said = PROGRESS_LINE.findall(capfd.readouterr().err)
    for stage in ("predict", "propagate"):
        assert f"{stage}: 2 of 2, 0:00 left" in said or any(x.startswith(stage) for x in said)


def test_a_recipe_passes_on_what_its_stages_say(data, tmp_path, capfd, monkeypatch):
    from rvos_nb.pipeline import run_workflow

    monkeypatch.setenv("RVOS_PROGRESS", "0")
    stage = {
        "name": "ask",
        "notebook": "predict",
        "parameters": {"data_dir": str(data), "out_dir": str(tmp_path / "out/run")},
    }
    run_workflow({"name": "x", "parameters": {"out": str(tmp_path / "out")}, "stages": [stage]})
    said = capfd.readouterr().out
    assert said.startswith("[1/1] ask (predict)") and re.search(r"\n +predict: [12] of 2, ", said)
    assert re.search(r"done in \d+ s", said)


def test_training_tells_how_long_it_takes(tmp_path):
    env = {**os.environ, "RVOS_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    argv = ["train", "train-toy", "--steps", "2", "--out", str(tmp_path / "out")]
    code = "from rvos_nb.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert any("of 2," in line for line in PROGRESS_LINE.findall(done.stderr)), done.stderr


def test_a_long_video_tells_its_progress_within_a_data_set(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RVOS_PROGRESS", "0")
    rvos("predict", "--data", data, "--out", tmp_path / "a")
    rvos("keyframe", tmp_path / "a")
    capfd.readouterr()
    rvos("propagate", data, tmp_path / "a", "--out", tmp_path / "b")
    assert "easy-00000: " not in capfd.readouterr().err  # short ones are not worth a line
    monkeypatch.setattr(core, "LINE_SECONDS", 0)
    rvos("propagate", data, tmp_path / "a", "--out", tmp_path / "c")
    assert re.search(r"(?m)^easy-00000: \d of 3, 0:0\d left$", capfd.readouterr().err)


def test_tiny_models_warn_of_a_data_set_that_is_not_shapes(data, tmp_path, capfd):
    shutil.copytree(data, tmp_path / "data")
    for root, notes in ((data, 0), (tmp_path / "data", 2)):
        out = tmp_path / f"out{notes}"
        rvos("predict", "--data", root, "--out", out / "a")
        rvos("keyframe", out / "a")
        rvos("propagate", root, out / "a", "--out", out / "b")
        assert capfd.readouterr().err.count("seen nothing but moving coloured shapes") == notes
        for mark in tmp_path.rglob("refshapes.json"):
            mark.unlink()


# A plan before anything is there


def test_a_dry_run_needs_no_parameters(capsys):
    rvos("run", "lsvos2023", "--dry")
    said = capsys.readouterr().out
    for line in ("data ", "soc ", "aot "):
        name = line.strip()
        assert re.search(rf"(?m)^  {name} +-p {name} VALUE", said)
    assert "AOT, Swin-L" in said and "submission" in said and "split                 test" in said
    with pytest.raises(SystemExit) as e:
        main(["run", "lsvos2023"])
    assert e.value.code == 1 and "no value for data, soc" in capsys.readouterr().err


def test_the_split_is_found(data, capsys):
    rvos("run", "lsvos2023", "--dry", "-p", "data", data)
    said = capsys.readouterr()
    assert "valid is taken" in said.err and re.search(r"(?m)^  split +valid", said.out)
    rvos("run", "lsvos2023", "--dry", "-p", "data", data, "-p", "split", "test")
    assert "is taken" not in capsys.readouterr().err


# Why


def test_a_report_says_who_outvoted_the_right_answer(data, tmp_path):
    from rvos_nb.explore import write_report
    from rvos_nb.fuse import fuse

    index = open_dataset(data)
    for name in ("right", "wrong", "false"):
        for e in index:
            truth = index.masks(e)
            for frame, mask in zip(index.videos[e.video].frames, truth):
                shown = mask if name == "right" else np.roll(mask, SIZE[0] // 2, 0)
                path = tmp_path / name / "Annotations" / e.video / e.id / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mask(path, shown)
    members = [tmp_path / name for name in ("right", "wrong", "false")]
    fuse(data, members, tmp_path / "fused", groups="none").check()
    runs = {"right": tmp_path / "right", "fused": tmp_path / "fused"}
    page = write_report(data, runs, tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.search(r"fused lost \d+ points against right: 2 of its 3 votes lie elsewhere", page)
    assert found, re.findall(r"fused lost[^<]*", page)
    assert "wrong (J 0); false (J 0)" in page
    write_json(tmp_path / "right/run.json", {"stage": "predict", "params": {}})
    same = write_report(data, {"right": tmp_path / "right"}, tmp_path / "r.html")
    assert "points against" not in same.read_text(encoding="utf-8")
