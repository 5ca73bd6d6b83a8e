"All objects of a video are followed once, and sentences choose among them."

import json
import shutil

import numpy as np
import pytest

from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import encode_mask, read_mask, write_tree
from rvos_nb.evaluate import evaluate
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.models import zoo
from rvos_nb.models.sam3 import SAM3, small_sam3
from rvos_nb.object_tracks import TrackOptions, track_objects
from rvos_nb.predict import predict
from rvos_nb.propagation import make_propagator
from rvos_nb.vos.propagator import Propagator

SIZE = (64, 96)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Easy scenes, with two members that answered them."
    root = tmp_path_factory.mktemp("tracks")
    refshapes.write(root / "data", "valid", "easy", 6, seed=21, frames=6, size=SIZE)
    for name in ("soc", "referformer"):
        predict(root / "data", root / name, f"{name}-tiny")
        choose_key_frames(root / name, "best_nonempty")
    return root


def runs(place):
    return [place / "referformer", place / "soc"]


def answer(data, run, masks):
    "A run of masks only, `masks` of an expression -> (T, H, W)."
    for e in data:
        folder = run / "Annotations" / e.video / e.id
        folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, masks(e))
    return run


def test_choosing_is_better_than_asking_alone(place):
    report = track_objects(place / "data", runs(place), place / "out")
    assert not report.failed
    tracked = evaluate(place / "data", place / "out")["J&F"]
    alone = [evaluate(place / "data", run)["J&F"] for run in runs(place)]
    assert tracked > max(alone)
    best = track_objects(place / "data", runs(place), place / "best", "oracle")
    assert not best.failed and evaluate(place / "data", place / "best")["J&F"] >= tracked - 1e-6


def test_frames_are_seen_once_whatever_is_asked(place, tmp_path):
    "The encoder works once for a frame and sweep, whatever the number of sentences and objects."
    aot = make_propagator(zoo.load("aot-tiny"))
    seen = []

    class Counting(type(aot)):
        def see(self, frame):
            seen.append(1)
            return super().see(frame)

    aot.__class__ = Counting
    data = open_dataset(place / "data")
    from rvos_nb import object_tracks

    make, object_tracks.make_propagator = object_tracks.make_propagator, lambda *_, **__: aot
    try:
        track_objects(place / "data", runs(place), tmp_path / "out")
    finally:
        object_tracks.make_propagator = make
    assert len(seen) <= 2 * sum(len(v.frames) for v in data.videos.values())
    assert len(data) > 2 * len(data.videos)


def test_several_and_nobody(tmp_path):
    refshapes.write(
        tmp_path / "data", "valid_u", "easy", 3, seed=4, frames=5, size=SIZE, layout="mevis"
    )
    data = open_dataset(tmp_path / "data", "valid_u")
    run = answer(data, tmp_path / "run", data.masks)
    for propagator in ("", "aot-tiny"):
        out = tmp_path / f"out{propagator}"
        options = {"split": "valid_u", "propagator": propagator}
        assert not track_objects(tmp_path / "data", [run], out, **options).failed
        score = evaluate(tmp_path / "data", out, split="valid_u")
        assert score["N-acc"] == score["T-acc"] == 100
        assert score["kinds"]["several"]["J&F"] > 90
        entries = json.loads(next((out / "choices").iterdir()).read_text())
        assert any(len(x["chosen"]) > 1 for x in entries["sentences"].values())


def test_a_sentence_that_was_misread_takes_the_object_of_another(place, tmp_path):
    "One run is wrong about one sentence and draws half of the right object: it gets the whole."
    data = open_dataset(place / "data")
    first = next(iter(data))

    def draw(e):
        masks = data.masks(e)
        if e == first:
            middle = np.flatnonzero(masks.any((0, 1))).mean()
            masks[..., : int(middle)] = False
        return masks

    run = answer(data, tmp_path / "run", draw)
    track_objects(place / "data", [run], tmp_path / "out", propagator="", same=0.4).check()
    frames = data.videos[first.video].frames
    folder = tmp_path / "out/Annotations" / first.video / first.id
    found = np.stack([read_mask(folder / f"{n}.png") for n in frames])
    others = [e for e in data.expressions[first.video] if e.object_id == first.object_id]
    assert len(others) > 1 and (found == data.masks(first)).mean() > 0.98


def test_tracks_of_sam3_are_proposals(tmp_path):
    refshapes.write(tmp_path / "data", "valid", "easy", 1, seed=4, frames=5, size=SIZE)
    predict(tmp_path / "data", tmp_path / "run", SAM3(*small_sam3(3)))
    track_objects(tmp_path / "data", [tmp_path / "run"], tmp_path / "out", propagator="").check()
    (entry,) = (tmp_path / "out/choices").iterdir()
    assert json.loads(entry.read_text())["objects"]


def test_nothing_proposed_is_nothing_answered(place, tmp_path):
    data = open_dataset(place / "data")
    run = answer(data, tmp_path / "run", lambda e: np.zeros_like(data.masks(e)))
    track_objects(place / "data", [run], tmp_path / "out").check()
    folder = next((tmp_path / "out/Annotations").glob("*/*"))
    assert not any(read_mask(p).any() for p in folder.iterdir())


def test_a_rating_below_the_least_is_nothing(place, tmp_path):
    track_objects(place / "data", runs(place), tmp_path / "out", least=1.0, propagator="").check()
    folders = (tmp_path / "out/Annotations").glob("*/*")
    drawn = [any(read_mask(p).any() for p in folder.iterdir()) for folder in folders]
    assert not all(drawn)


def test_a_video_that_a_run_lacks_fails_alone_and_is_done_later(place, tmp_path):
    data, run = open_dataset(place / "data"), tmp_path / "run"
    shutil.copytree(place / "soc", run)
    video, e = next((e.video, e) for e in data)
    path = run / "Annotations" / video / e.id / f"{data.videos[video].frames[1]}.png"
    kept = path.read_bytes()
    path.write_bytes(b"broken")
    report = track_objects(place / "data", [run], tmp_path / "out", propagator="")
    assert list(report.failed) == [video] and len(report.done) == len(data.videos) - 1
    path.write_bytes(kept)
    report = track_objects(place / "data", [run], tmp_path / "out", propagator="")
    assert not report.failed and report.done == [video]
    report = track_objects(place / "data", [run], tmp_path / "out", propagator="")
    assert not report.done
    path.write_bytes(encode_mask(np.zeros(SIZE, bool)))
    report = track_objects(place / "data", [run], tmp_path / "out", propagator="")
    assert report.done == [video]


def test_impossible_options():
    for options in ({"same": 2}, {"least": -1}):
        with pytest.raises(Problem, match=next(iter(options))):
            TrackOptions(**options)


def test_no_runs_and_no_propagator(place, tmp_path):
    with pytest.raises(Problem, match="one run or more"):
        track_objects(place / "data", [], tmp_path / "out")
    with pytest.raises(Problem, match="propagates"):
        track_objects(place / "data", runs(place), tmp_path / "out", propagator="soc-tiny")
    assert issubclass(type(make_propagator("aot-tiny")), Propagator)
