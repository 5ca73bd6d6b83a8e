"""The stage contract on real runs:
what one bad file costs, and a run killed in the middle ends in the bytes of an undisturbed one."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rvos_nb import files
from rvos_nb.candidates import load_candidates, save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.video import open_clip
from rvos_nb.evaluate import evaluate
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.predict import predict
from rvos_nb.propagate import propagate
from rvos_nb.segmentation import segment
from rvos_nb.stage import StageFailed


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "Four small videos."
    root = tmp_path_factory.mktemp("data")
    refshapes.write(root, "valid", "easy", videos=4, seed=5, frames=4, size=(48, 72))
    return root


@pytest.fixture
def data(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "data"))


def tree(folder):
    "Every file below `folder` with its bytes."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def first_frame(data):
    return sorted((data / "valid" / "JPEGImages").glob("*/*.jpg"))[1]


def expressions(data):
    return data / "meta_expressions" / "valid" / "meta_expressions.json"


def cut(data):
    p = first_frame(data)
    p.write_bytes(p.read_bytes()[:300])
    return p.name, "complete JPEG"


def lost(data):
    p = first_frame(data)
    p.unlink()
    return p.name, "no such file"


def other_size(data):
    p = first_frame(data)
    Image.new("RGB", (31, 17)).save(p)
    return p.name, "17x31"


def edit(data, change):
    meta = json.loads(expressions(data).read_text())
    change(meta["videos"])
    expressions(data).write_text(json.dumps(meta))


def empty_sentence(data):
    edit(data, lambda v: next(iter(v.values()))["expressions"]["0"].update(exp="  "))
    return "meta_expressions.json", "sentence"


def climbing_id(data):
    edit(data, lambda v: v.update({"../x": v[next(iter(v))]}))
    return "meta_expressions.json", "../x"


@pytest.mark.parametrize(
    "spoil, done", [(cut, 3), (lost, 3), (other_size, 3), (empty_sentence, 4), (climbing_id, 4)]
)
def test_one_bad_unit_costs_itself_only(data, tmp_path, spoil, done):
    file, word = spoil(data)
    report = predict(data, tmp_path / "run")
    assert len(report.done) == done and len(report.failed) == 1
    reason = next(iter(report.failed.values()))
    assert file in reason and word in reason and "\n" not in reason and "expected" in reason
    with pytest.raises(StageFailed, match="1 failed"):
        report.check()
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".tmp-")]
    assert not (tmp_path / "x").exists()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        state["failures"] == report.failed and sorted(state["units"].values()).count("done") == done
    )


def test_mended_input_is_picked_up(data, tmp_path, clean):
    victim = first_frame(data)
    lost(data)
    predict(data, tmp_path / "run")
    shutil.copy(clean / victim.relative_to(data), victim)
    again = predict(data, tmp_path / "run")
    assert len(again.done) == 1 and not again.failed
    predict(clean, tmp_path / "undisturbed")
    assert tree(tmp_path / "run") == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("text", ["[]", '{"videos": []}', '{"videos": {"a": 3}}', "not json"])
def test_a_json_that_is_not_the_layout(data, tmp_path, text):
    expressions(data).write_text(text)
    try:
        report = predict(data, tmp_path / "run")
    except Problem as e:
        assert "meta_expressions.json" in str(e)
    else:
        assert report.failed and not report.done


def test_a_model_that_takes_no_sentence(data, tmp_path):
    with pytest.raises(Problem, match="aot-tiny"):
        predict(data, tmp_path / "run", model="aot-tiny")
    with pytest.raises(Problem):
        predict(data, tmp_path / "run", model=str(tmp_path / "nowhere"))


def test_a_full_disk_keeps_what_is_done(data, tmp_path, monkeypatch):
    flush = files._flush

    def full(path):  # the disk fills up as soon as the first video stands
        if list((tmp_path / "run" / "Annotations").glob("[!.]*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(Problem, match="no space left"):  # run.json cannot be written either
        predict(data, tmp_path / "run")
    monkeypatch.undo()
    standing = tree(tmp_path / "run" / "Annotations")
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    report = predict(data, tmp_path / "run")
    assert (
        not report.failed
        and report.skipped
        and standing.items() <= tree(tmp_path / "run" / "Annotations").items()
    )


def test_an_empty_sentence_for_a_clip(clean, tmp_path):
    clip = open_clip(first_frame(clean).parent)
    with pytest.raises(Problem, match="empty sentence"):
        segment(clip, [" "], None, tmp_path)


def test_a_video_without_a_usable_sentence_fails_once(data, tmp_path):
    def spoil(videos):
        for e in next(iter(videos.values()))["expressions"].values():
            e["exp"] = ""

    edit(data, spoil)
    report = predict(data, tmp_path / "run")
    assert len(report.done) == 3 and all(
        "sentence" in why and "/" in unit for unit, why in report.failed.items()
    )


def test_results_of_another_run_are_not_taken_for_done(clean, tmp_path):
    for name in ("a", "b"):
        predict(clean, tmp_path / name, short_side=0 if name == "a" else 64).check()
        choose_key_frames(tmp_path / name)
    propagate(clean, tmp_path / "a", tmp_path / "out").check()
    assert len(propagate(clean, tmp_path / "a", tmp_path / "out").skipped)
    with pytest.raises(Problem, match="masks"):
        propagate(clean, tmp_path / "b", tmp_path / "out")


RUNS = {
    "predict": """
from rvos_nb.predict import predict
predict({data!r}, {out!r}).check()
""",
    "propagate": """
from rvos_nb.propagate import propagate
propagate({data!r}, {pred!r}, {out!r}).check()
""",
    "fuse": """
from rvos_nb.fuse import fuse
fuse({data!r}, [{pred!r}, {pred!r}], {out!r}).check()
""",
}


# kill -9 while the files of a unit are being flushed and another unit already stands
DIE = """
import os, signal
from pathlib import Path
from rvos_nb import files
flush = files._flush
def die(p):
    whole_units = list(Path({out!r}, 'Annotations').glob('[!.]*/[!.]*'))
    if p.parent.name.startswith('.tmp-') and whole_units:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(p)
files._flush = die
"""


@pytest.mark.parametrize("stage", RUNS)
def test_killed_and_run_again(clean, tmp_path, stage):
    data, pred = str(clean), str(tmp_path / "pred")
    if stage != "predict":
        predict(data, pred).check()
        choose_key_frames(pred)

    def code(out):
        return RUNS[stage].format(data=data, pred=pred, out=str(tmp_path / out))

    run = subprocess.run(
        [sys.executable, "-c", DIE.format(out=str(tmp_path / "killed")) + code("killed")],
        stderr=subprocess.PIPE,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert list((tmp_path / "killed").rglob(".tmp-*")), "killed in the middle of a unit"
    subprocess.run([sys.executable, "-c", code("whole")], check=True)
    before = tree(tmp_path / "killed" / "Annotations")
    assert before and len(before) < len(tree(tmp_path / "whole" / "Annotations"))
    subprocess.run([sys.executable, "-c", code("killed")], check=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_key_frames_where_all_scores_are_equal(tmp_path):
    """Scores as MUTR's, one value for all frames of a sentence: the surest mask propagates better
    than that of frame 0, the published choice."""
    refshapes.write(tmp_path / "data", "valid", "medium", videos=3, seed=7, frames=12)
    predict(tmp_path / "data", tmp_path / "run").check()
    for path in (tmp_path / "run/candidates").glob("*/*.safetensors"):
        arrays, about = load_candidates(path)
        equal = np.full_like(arrays["scores"], arrays["scores"].mean())
        save_candidates(path, arrays["logits"], equal, arrays["boxes"], about)
    found = {}
    for policy in ("score", "mask_score"):
        keys = choose_key_frames(tmp_path / "run", policy)
        frames = [e["index_info"]["class_index"] for es in keys.values() for e in es.values()]
        assert any(frames) == (policy == "mask_score")
        propagate(tmp_path / "data", tmp_path / "run", tmp_path / policy, force=True).check()
        found[policy] = evaluate(tmp_path / "data", tmp_path / policy, tmp_path / "scores")["J&F"]
    assert found["mask_score"] > found["score"] + 1
