"""Done means that a result stands and belongs to these inputs: what has changed is made again, and
nothing else."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.evaluate import evaluate
from rvos_nb.files import sweep_temporary
from rvos_nb.fuse import fuse
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.label_maps import merge_annotators
from rvos_nb.predict import predict
from rvos_nb.propagate import propagate
from rvos_nb.stage import locked, locked_file
from rvos_nb.study import study
from rvos_nb.submit import submission


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three small videos, and a run of each stage over them."
    root = tmp_path_factory.mktemp("made")
    refshapes.write(root / "data", "valid", "easy", videos=3, seed=5, frames=3, size=(48, 72))
    for stage in STAGES:
        STAGES[stage](root).check()
        if stage == "predict":
            shutil.copytree(root / "predict", root / "other")
            choose_key_frames(root / "predict")
    return root


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "made"))


STAGES = {
    "predict": lambda root: predict(root / "data", root / "predict"),
    "propagate": lambda root: propagate(root / "data", root / "predict", root / "propagate"),
    "fuse": lambda root: fuse(root / "data", [root / "predict", root / "other"], root / "fuse"),
    "merge": lambda root: merge_annotators(
        open_dataset(root / "data"), root / "predict", root / "merge"
    ),
}


def tree(folder):
    "Every result below `folder` with its bytes."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.suffix in (".png", ".safetensors")
    }


def first_video(root):
    return sorted(p.name for p in (root / "data/valid/JPEGImages").iterdir())[0]


def edit_sentence(root):
    path = root / "data/meta_expressions/valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    first = listing["videos"][first_video(root)]["expressions"]
    first[min(first)]["exp"] = "the square on the left"
    path.write_text(json.dumps(listing))


def turn_frames(root):
    path = root / "data/meta_expressions/valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    listing["videos"][first_video(root)]["frames"].reverse()
    path.write_text(json.dumps(listing))


def paint_frame(root):
    path = min((root / "data/valid/JPEGImages" / first_video(root)).iterdir())
    Image.fromarray(np.array(Image.open(path))[::-1, ::-1]).save(path, quality=95)


def edit_mask(root):
    "All masks of a video, inverted: as many pixels as before."
    for path in (root / "predict/Annotations" / first_video(root)).rglob("*.png"):
        mask = np.array(Image.open(path).convert("L"))
        Image.fromarray(255 - mask).convert("1").save(path)


@pytest.mark.parametrize(
    "stage, change",
    [
        ("predict", edit_sentence),
        ("predict", turn_frames),
        ("predict", paint_frame),
        ("propagate", paint_frame),
        ("propagate", edit_mask),
        ("fuse", edit_mask),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_what_has_changed_is_made_again(stage, change, root, tmp_path):
    video = first_video(root)
    change(root)
    report = STAGES[stage](root).check()
    own = [u for u in report.done if u.split("/")[0] == video]
    assert own and report.done == own == report.again
    assert report.skipped and not any(u.split("/")[0] == video for u in report.skipped)
    assert "made again" in report.table()
    found = tree(root / stage)
    shutil.rmtree(root / stage)
    STAGES[stage](root).check()
    assert tree(root / stage) == found
    assert not STAGES[stage](root).done


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_touched_only_stays(stage, root):
    for path in root.rglob("*"):
        if path.is_file() and stage not in path.parts:
            os.utime(path)
    report = STAGES[stage](root).check()
    assert not report.done and report.skipped and not report.again


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spoil", ["empty", "rename", "remove"])
def test_a_result_that_is_not_whole_is_made_again(stage, spoil, root):
    before = tree(root / stage)
    mask = next(p for p in sorted((root / stage).rglob("*.png")) if first_video(root) in p.parts)
    if spoil == "empty":
        mask.write_bytes(b"")
    elif spoil == "rename":
        mask.rename(mask.with_stem("renamed"))
    else:
        mask.unlink()
    report = STAGES[stage](root).check()
    assert len(report.done) == 1 and report.done[0].split("/")[0] == first_video(root)
    assert tree(root / stage) == before


def test_candidates_that_are_gone_are_made_again(root):
    before = tree(root / "predict")
    next(p for p in sorted((root / "predict/candidates").rglob("*.safetensors"))).unlink()
    report = STAGES["predict"](root).check()
    assert report.done == [first_video(root)] and tree(root / "predict") == before


def test_an_output_folder_that_is_removed_under_way_is_named(root, monkeypatch):
    from rvos_nb import predict as module

    shutil.rmtree(root / "predict")
    write, calls = module.PredictWork.write, []

    def write_and_remove(self, unit, answer):
        write(self, unit, answer)
        calls.append(unit)
        if len(calls) == 2:
            shutil.rmtree(self.out / "Annotations")

    monkeypatch.setattr(module.PredictWork, "write", write_and_remove)
    report = STAGES["predict"](root)
    assert report.failed and all("no result" in why for why in report.failed.values())
    monkeypatch.undo()
    assert not STAGES["predict"](root).check().failed


def test_only_our_own_leftovers_are_swept(tmp_path):
    mine, ours = tmp_path / ".tmp-20240101-notes.txt", tmp_path / "a/.tmp-0123abcd-0.png"
    nested = tmp_path / "run/.tmp-0123abcd-0.png"
    for path in (mine, ours, nested):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (tmp_path / "run/run.json").write_text("{}")
    assert sweep_temporary(tmp_path) == [ours]
    assert mine.exists() and nested.exists() and not ours.exists()


def test_a_wrong_executor_leaves_nothing(root, tmp_path):
    with pytest.raises(Problem, match="executor"):
        predict(root / "data", tmp_path / "run", executor="threads")
    assert not (tmp_path / "run").exists()


def replace_frame(path):
    "Other bytes, as many as before: a comment in the header."
    held = path.read_bytes()
    path.write_bytes(held[:-3] + bytes([held[-3] ^ 1]) + held[-2:])


def test_a_frame_that_is_replaced_while_a_stage_works(root, monkeypatch):
    from rvos_nb import predict as module

    shutil.rmtree(root / "predict")
    video, write = first_video(root), module.PredictWork.write

    def write_and_replace(self, unit, answer):
        write(self, unit, answer)
        if unit == video:
            replace_frame(min((root / "data/valid/JPEGImages" / video).iterdir()))

    monkeypatch.setattr(module.PredictWork, "write", write_and_replace)
    report = STAGES["predict"](root)
    assert [*report.failed] == [video] and "changed while the stage ran" in report.failed[video]
    assert ".jpg" in report.failed[video]
    monkeypatch.undo()
    assert STAGES["predict"](root).check().done == [video]
    assert not STAGES["predict"](root).done


@pytest.mark.parametrize("stage", STAGES)
def test_results_that_were_copied_without_their_times(stage, root, monkeypatch):
    shutil.copytree(root / stage, root / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(root / stage)
    os.rename(root / "copy", root / stage)
    report = STAGES[stage](root).check()
    assert not report.done and report.skipped
    replace_frame(min((root / "data/valid/JPEGImages" / first_video(root)).iterdir()))
    shutil.copytree(root / stage, root / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(root / stage)
    os.rename(root / "copy", root / stage)
    reads_frames = stage in ("predict", "propagate")
    assert bool(STAGES[stage](root).check().again) == reads_frames


WRITERS = {
    "evaluate": lambda root, out: evaluate(root / "data", root / "predict", out),
    "keyframe": lambda root, out: choose_key_frames(out),
    "submit": lambda root, out: submission(root / "data", root / "predict", out / "s.zip"),
    "search": lambda root, out: study(
        root / "data", [root / "predict", root / "other"], out, folds=2
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_of_a_folder_hold_it_and_sweep_it(writer, root, monkeypatch):
    out = root / "predict" if writer == "keyframe" else root / "scores"
    out.mkdir(exist_ok=True)
    mine, left = out / ".tmp-notes", out / ".tmp-f0123abc-s.zip"
    for path in (mine, left):
        path.write_text("x")
    hold = locked_file(out / "s.zip") if writer == "submit" else locked(out)
    with hold, pytest.raises(Problem, match="another run at work"):
        WRITERS[writer](root, out)
    left.write_text("x")
    WRITERS[writer](root, out)
    assert mine.exists() and not left.exists()
    assert not list(out.glob(".*lock")) and not list(out.glob(".*owner"))


def test_a_refused_evaluation_leaves_no_folder(root):
    shutil.rmtree(root / "predict/Annotations")
    (root / "predict/Annotations").mkdir()
    with pytest.raises(Problem):
        evaluate(root / "data", root / "predict", root / "scores")
    assert not (root / "scores").exists()
