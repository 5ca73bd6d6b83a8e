"""Several objects, or none, from a model's tracks through key frames, propagation and fusion to
N-acc and T-acc."""

import json

import numpy as np
import pytest
import torch
from helpers import Still

from rvos_nb.candidates import load_tracks
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.video import read_video
from rvos_nb.evaluate import evaluate
from rvos_nb.fuse import fuse
from rvos_nb.keyframe import choose_key_frames, read_key_frames, read_track_frames
from rvos_nb.models.referring import Candidates, Referring, Tracks, draw_together
from rvos_nb.predict import PredictOptions, ask_video, predict
from rvos_nb.presence import put_behind
from rvos_nb.propagate import propagate


class Knowing(Referring):
    """Knows the truth of a data set; gives it as tracks, with a wrong object beside, of which it is
    not sure."""

    def __init__(self, data):
        self.clips = {}
        for v, video in data.videos.items():
            frames = np.stack(list(read_video(video)))
            self.clips[frames.tobytes()] = data, v

    def see(self, frames, short_side=None):
        known = next(k for k in self.clips if frames.tobytes() in k)
        start = known.index(frames.tobytes()) // frames[0].nbytes
        return *self.clips[known], slice(start, start + len(frames)), frames.shape[1:3]

    def refer(self, seen, texts):
        data, video, time, size = seen
        by_text = {e.text: e for e in data.expressions[video]}
        tracks = [self.follow(data, by_text[text], time) for text in texts]
        logits = torch.stack([draw_together(x.logits) for x in tracks])
        scores = torch.stack([x.scores.amax(0) for x in tracks])
        return Candidates(logits, scores, torch.zeros(*scores.shape, 4), size, tracks=tracks)

    def follow(self, data, expression, time):
        truth = data.masks(expression)[time]
        wrong = np.zeros_like(truth)
        wrong[:, :8, :8] = True
        left, right = truth.copy(), truth.copy()
        half = truth.shape[2] // 2
        left[:, :, half:], right[:, :, :half] = False, False
        masks = torch.from_numpy(np.stack([left, right, wrong])).float()
        belief = torch.tensor([0.9, 0.8, 0.3])[:, None]
        return Tracks(20 * masks - 10, belief * masks.amax((2, 3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("mevis")
    refshapes.write(path / "data", "valid_u", "medium", videos=2, seed=5, frames=5, layout="mevis")
    return path


@pytest.fixture(scope="module")
def data(place):
    data = open_dataset(place / "data", "valid_u")
    assert {"several", "none"} <= {e.kind for e in data}
    return data


@pytest.fixture(scope="module")
def gated(place, data):
    predict(place / "data", place / "gated", Knowing(data), "valid_u", present=0.5).check()
    return place / "gated"


def score(place, run):
    return evaluate(place / "data", run, "", "valid_u")


def test_the_gate_draws_several_objects_or_none(place, data, gated):
    found = score(place, gated)
    assert found["N-acc"] == found["T-acc"] == found["J&F"] == 100
    predict(place / "data", place / "open", Knowing(data), "valid_u").check()
    found = score(place, place / "open")
    assert found["N-acc"] == 0 and found["T-acc"] == 100 and found["J&F"] < 100
    assert json.loads((gated / "run.json").read_text())["params"]["present"] == 0.5
    assert "present" not in json.loads((place / "open/run.json").read_text())["params"]


def test_only_what_is_drawn_is_kept_as_a_track(data, gated):
    for e in data:
        arrays, _ = load_tracks(gated / "candidates" / e.video / f"{e.id}.safetensors")
        assert len(arrays["tracks"]) <= 2
        if e.kind == "none":
            assert len(arrays["tracks"]) == 0


def test_each_object_has_a_key_frame_and_is_followed(place, data, gated):
    choose_key_frames(gated)
    keys, tracks = (read(gated / "key_frame.json") for read in (read_key_frames, read_track_frames))
    assert {e.video for e in data} == set(keys)
    several = [(v, e) for v, es in tracks.items() for e in es]
    assert several and all(len(tracks[v][e]) == 2 for v, e in several)
    report = propagate(place / "data", gated, place / "moved", Still(), "valid_u")
    report.check()
    found = score(place, place / "moved")
    assert found["N-acc"] == found["T-acc"] == 100 and 50 < found["J&F"] < 100
    assert not propagate(place / "data", gated, place / "moved", Still(), "valid_u").done


class Alone(Still):
    "Cannot be forked, so objects are followed one by one."

    def fork(self, scale=None):
        return None


def test_a_propagator_without_forks_gives_the_same(place, gated):
    choose_key_frames(gated)
    propagate(place / "data", gated, place / "moved1", Still(), "valid_u").check()
    propagate(place / "data", gated, place / "moved2", Alone(), "valid_u").check()
    files = sorted((place / "moved1" / "Annotations").rglob("*.png"))
    assert files
    for path in files:
        other = place / "moved2" / path.relative_to(place / "moved1")
        assert path.read_bytes() == other.read_bytes()


def test_fusion_leaves_nothing_where_most_say_nothing(place, data, gated):
    predict(place / "data", place / "whole", Knowing(data), "valid_u").check()
    members = [gated, gated, place / "whole"]
    for run in (gated, place / "whole"):
        choose_key_frames(run)
    options = {"groups": "none", "rule": "round2"}
    fuse(place / "data", members, place / "fused", "valid_u", **options).check()
    found = score(place, place / "fused")
    assert found["N-acc"] == found["T-acc"] == 100


def test_clips_of_a_video_give_the_same_masks(data):
    model, v = Knowing(data), next(iter(data.videos))
    texts = [e.text for e in data.expressions[v]]
    whole = ask_video(model, data.videos[v], texts)
    pieces = ask_video(model, data.videos[v], texts, clip_length=2)
    assert np.array_equal(whole["logits"], pieces["logits"])
    logits, scores = pieces["tracks"][0]
    assert logits.shape[:2] == scores.shape == (9, 5) and len(whole["tracks"][0][0]) == 3
    assert np.array_equal(logits.max(0), whole["logits"][0])


def test_probabilities_are_absent_at_zero():
    one = np.full((1, 2, 3, 3), 0.5, np.float32), np.ones((1, 2), np.float32)
    tracks, _ = put_behind([one, one], "probability")
    assert tracks[0, 2:].max() == 0 and tracks[1, 2:].min() == 0.5


def test_impossible_thresholds_are_refused(place, data):
    with pytest.raises(Problem, match="present"):
        predict(place / "data", place / "no", Knowing(data), "valid_u", present=1.5)
    assert PredictOptions().threshold == 0.5
