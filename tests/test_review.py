"""Judges, and the stage that asks them."""

import json

import numpy as np
import pytest
from helpers import Still

from rvos_nb.candidates import save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import write_mask
from rvos_nb.evaluate import evaluate
from rvos_nb.judge import (
    MaskJudge,
    MaskVerdict,
    VideoFrames,
    choose_shown,
    load_vision_language,
    parse_answer,
    small_vision_language,
)
from rvos_nb.models.sam3 import small_sam3
from rvos_nb.review import count_verdicts, read_verdicts, review


def write_run(folder, data, answer):
    "A run whose masks of an expression are those of `answer(n, truth)`."
    for n, e in enumerate(data):
        for name, mask in zip(data.videos[e.video].frames, answer(n, data.masks(e))):
            write_mask(folder / "Annotations" / e.video / e.id / f"{name}.png", mask)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("review")
    refshapes.write(path / "data", "valid", "easy", videos=2, seed=3, frames=4, size=(64, 96))
    return path


@pytest.fixture(scope="module")
def data(place):
    return open_dataset(place / "data")


@pytest.fixture(scope="module")
def runs(place, data):
    "The first is wrong about even sentences, the second about those that three divides."
    return [
        write_run(place / name, data, lambda n, m, by=by: m[:, :, ::-1] if n % by == 0 else m)
        for name, by in (("first", 2), ("second", 3))
    ]


def score(place, run):
    return evaluate(place / "data", run)["J&F"]


def test_the_oracle_never_makes_it_worse_and_helps_where_there_is_better(place, data, runs):
    review(place / "data", runs[:1], place / "alone", "oracle").check()
    assert score(place, place / "alone") == score(place, runs[0])
    review(place / "data", runs, place / "both", "oracle").check()
    assert score(place, place / "both") > max(score(place, run) for run in runs) + 5
    verdicts = read_verdicts(place / "both")
    assert list(verdicts) == [f"{e.video}/{e.id}" for e in data]
    ways = count_verdicts(verdicts)
    assert sum(ways.values()) == len(data) and ways["accepted at another try"] > 0
    for n, entry in enumerate(verdicts.values()):
        if n % 2:
            assert entry["chosen"] == "first" and len(entry["verdicts"]) == 1
        elif n % 3:
            assert entry["chosen"] == "second" and len(entry["verdicts"]) == 2
            assert "overlaps the truth by" in entry["verdicts"][0]["reason"]


def test_a_judge_who_accepts_everything_changes_nothing(place, data, runs):
    class Anything(MaskJudge):
        def judge(self, frames, masks, text):
            return MaskVerdict(True, 1.0, "why not")

    review(place / "data", runs, place / "any", Anything()).check()
    for path in (runs[0] / "Annotations").rglob("*.png"):
        other = place / "any" / path.relative_to(runs[0])
        assert other.read_bytes() == path.read_bytes()


def test_it_goes_on_where_it_stopped(place, data, runs):
    out = place / "again"
    review(place / "data", runs, out, "oracle").check()
    whole = (out / "verdicts.json").read_bytes()
    first = next(iter(data))
    (out / "verdicts" / first.video / f"{first.id}.json").unlink()
    report = review(place / "data", runs, out, "oracle")
    assert report.done == [f"{first.video}/{first.id}"]
    assert (out / "verdicts.json").read_bytes() == whole


def test_other_seed_frames_are_tried(place, data, monkeypatch):
    "Frame 0 has the best score and the wrong object; frame 2 is right."
    seeds = write_run(place / "seeds", data, lambda n, m: np.stack([m[0, :, ::-1], *m[1:]]))
    for e in data:
        names = list(data.videos[e.video].frames)
        about = {"kind": "logit", "size": [64, 96], "frames": names}
        path = seeds / "candidates" / e.video / f"{e.id}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = np.array([0.9, 0.2, 0.8, 0.1])
        save_candidates(path, np.zeros((4, 2, 2)), scores, np.zeros((4, 4)), about)
    wrong = write_run(place / "wrong", data, lambda n, m: m[:, :, ::-1])
    monkeypatch.setattr("rvos_nb.review.make_propagator", lambda *a, **k: Still())
    options = {"seeds": 1, "seed_run": str(seeds), "least": 0.3}
    review(place / "data", [wrong], place / "reseeded", "oracle", **options).check()
    verdicts = read_verdicts(place / "reseeded").values()
    assert "frame 2" in {entry["chosen"] for entry in verdicts}
    assert score(place, place / "reseeded") > score(place, wrong) + 20
    record = json.loads((place / "reseeded/run.json").read_text())
    assert record["params"]["seeds"] == 1
    with pytest.raises(Problem, match="seed_run"):
        review(place / "data", [wrong], place / "no", "oracle", seeds=1)


def test_agreement_follows_the_majority(place, data, runs):
    third = write_run(place / "third", data, lambda n, m: m)
    options = {"least": 0.6}
    report = review(place / "data", [*runs, third], place / "most", "agreement", **options)
    report.check()
    assert score(place, place / "most") >= max(score(place, run) for run in runs)


def test_a_models_presence_judges(place, data, runs):
    for part in small_sam3(3):
        part.save_pretrained(place / "sam3")
    judge = f"presence:{place / 'sam3'}"
    review(place / "data", runs[:1], place / "present", judge).check()
    verdicts = read_verdicts(place / "present").values()
    assert all(entry["verdicts"][0]["accepted"] for entry in verdicts)  # it finds all to be there
    with pytest.raises(Exception, match="tells no presence"):
        review(place / "data", runs[:1], place / "mute", "presence:referformer-tiny").check()


def test_a_vision_language_model_judges(place, data, runs):
    for part in small_vision_language():
        part.save_pretrained(place / "vlm")
    judge = load_vision_language(place / "vlm")
    e = next(iter(data))
    frames, masks = VideoFrames(data.videos[e.video]), data.masks(e)
    assert judge.judge(frames, masks, e.text) == judge.judge(frames, masks, e.text)
    review(place / "data", runs[:1], place / "seen", str(place / "vlm")).check()
    reasons = [v["verdicts"][0]["reason"] for v in read_verdicts(place / "seen").values()]
    assert all("yes or no" in r or "answered" in r for r in reasons)
    shown = []
    judge.ask = lambda pictures, question: shown.append((len(pictures), question)) or "No, never."
    assert not judge.judge(frames, masks, e.text).accepted
    assert judge.judge(frames, masks & False, e.text).accepted
    assert [count for count, _ in shown] == [4, 4]
    assert e.text in shown[0][1] and "painted red" not in shown[1][1]


def test_answers_are_parsed_by_their_first_word_that_counts():
    for said, meant in (
        ("yes", True),
        ("No.", False),
        ("Not at all", None),
        ("Well, yes and no", True),
        ("nothing, noon, yesterday", None),
    ):
        assert parse_answer(said) is meant
    assert choose_shown(np.ones((1, 2, 2), bool), 4) == [0]


def test_wrong_judges_are_refused(place, data, runs, tmp_path):
    for judge, match in (("somebody", "the folder of a vision"), (str(tmp_path), "no config")):
        with pytest.raises(Problem, match=match):
            review(place / "data", runs, tmp_path / "out", judge)
    with pytest.raises(Problem, match="least"):
        review(place / "data", runs, tmp_path / "out", "oracle", least=2)
