"Where propagation begins: by presence, by the words, without a look; and several frames to try."

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask
from rvos_nb.data.scenes import WORDS
from rvos_nb.data.video import read_video
from rvos_nb.frame_text import FrameTextModel, load_frame_text, small_frame_text
from rvos_nb.keyframe import choose_key_frames, from_json, read_seed_frames
from rvos_nb.models.sam3 import SAM3, small_sam3
from rvos_nb.predict import predict
from rvos_nb.propagate import propagate
from rvos_nb.review import review
from rvos_nb.stage import StageFailed

SIZE = (64, 96)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeds")
    refshapes.write(root / "data", "valid", "easy", 2, seed=5, frames=8, size=SIZE)
    predict(root / "data", root / "soc", "soc-tiny")
    for part in small_frame_text(WORDS):
        part.save_pretrained(root / "clip")
    return root


def read_drawn(run, v, e, frames):
    return np.array([read_mask(run / "Annotations" / v / e / f"{n}.png").any() for n in frames])


def test_words_choose_the_frame_that_fits_best(place):
    run, data = place / "soc", open_dataset(place / "data")
    chosen = from_json(choose_key_frames(run, "text", 1, place / "data", "valid", place / "clip"))
    clip = load_frame_text(place / "clip")
    for v, video in data.videos.items():
        scores = clip.score(read_video(video), [e.text for e in data.expressions[v]])
        for e, row in zip(data.expressions[v], scores):
            drawn = read_drawn(run, v, e.id, video.frames)
            row = np.where(drawn, row, -1) if drawn.any() else row
            assert chosen[v][e.id] == row.argmax()


def test_a_video_is_read_once_for_all_its_sentences(place, monkeypatch):
    seen, embed = [], FrameTextModel.embed_frames

    def count(self, frames):
        seen.append(1)
        return embed(self, frames)

    monkeypatch.setattr(FrameTextModel, "embed_frames", count)
    choose_key_frames(place / "soc", "text", 1, place / "data", "valid", place / "clip")
    assert len(seen) == 2


def test_presence_is_asked_of_a_model_that_tells_it(place, tmp_path):
    predict(place / "data", tmp_path / "sam3", SAM3(*small_sam3(3)))
    chosen = from_json(choose_key_frames(tmp_path / "sam3", "presence"))
    for v, es in chosen.items():
        for e, k in es.items():
            present = load_file(tmp_path / "sam3/candidates" / v / f"{e}.safetensors")["present"]
            frames = open_dataset(place / "data").videos[v].frames
            drawn = read_drawn(tmp_path / "sam3", v, e, frames)
            among = np.where(drawn, present, -1) if drawn.any() else present
            assert np.isclose(among[k], among.max(), atol=1e-5)
    with pytest.raises(StageFailed, match="no presence"):
        choose_key_frames(place / "soc", "presence")


def test_uniform_is_the_middle_and_spreads(place):
    run, data = place / "soc", open_dataset(place / "data")
    once = from_json(choose_key_frames(run, "uniform"))
    assert "seeds" not in json.dumps(json.loads((run / "key_frame.json").read_text()))
    several = choose_key_frames(run, "uniform", 3)
    assert from_json(several) == once
    seeds = read_seed_frames(run / "key_frame.json")
    for v, video in data.videos.items():
        for e in data.expressions[v]:
            drawn = np.flatnonzero(read_drawn(run, v, e.id, video.frames))
            mine = seeds[v][e.id]
            assert mine[0] == once[v][e.id] and len(set(mine)) == len(mine) <= 3
            assert not len(drawn) or {*mine} <= {*drawn}
            if len(drawn) == 8:
                assert mine[0] in (3, 4) and np.diff(sorted(mine)).min() >= 2


def test_propagation_starts_there_and_review_tries_the_others(place, tmp_path):
    choose_key_frames(place / "soc", "uniform", 3)
    assert not propagate(place / "data", place / "soc", tmp_path / "aot").failed
    options = {"seeds": 2, "seed_run": str(place / "soc"), "least": 1.0}
    runs = [tmp_path / "aot"]
    assert not review(place / "data", runs, tmp_path / "out", "oracle", **options).failed
    verdicts = json.loads((tmp_path / "out/verdicts.json").read_text())
    seeds = read_seed_frames(place / "soc/key_frame.json")
    tried = 0
    for unit, said in verdicts.items():
        v, e = unit.split("/")
        names = [x["answer"] for x in said["verdicts"][1:]]
        expected = [f"frame {k}" for k in seeds[v][e][1:]]
        assert names == expected[: len(names)]
        tried += len(names)
    assert tried
    report = review(place / "data", runs, tmp_path / "out", "oracle", **options)
    assert not report.done  # nothing changed
    choose_key_frames(place / "soc", "best_nonempty", 2)
    report = review(place / "data", runs, tmp_path / "out", "oracle", **options)
    assert report.done


def test_what_text_needs(place, tmp_path, capsys):
    for options in ({}, {"data_dir": place / "data"}, {"text_model": place / "clip"}):
        with pytest.raises(Problem, match="text_model"):
            choose_key_frames(place / "soc", "text", **options)
    with pytest.raises(Problem, match="CLIP"):
        options = {"data_dir": place / "data", "text_model": tmp_path}
        choose_key_frames(place / "soc", "text", **options)
    refshapes.write(tmp_path / "other", "valid", "hard", 1, seed=5, frames=8, size=SIZE)
    with pytest.raises(StageFailed, match="no video"):
        options = {"data_dir": tmp_path / "other", "text_model": place / "clip"}
        choose_key_frames(place / "soc", "text", **options)
    with pytest.raises(Problem, match="seeds"):
        choose_key_frames(place / "soc", seeds=0)
    with pytest.raises(SystemExit) as end:
        command = ["keyframe", str(place / "soc"), "--policy", "text", "--seeds", "2"]
        more = ["--data", str(place / "data"), "--text-model", str(place / "clip")]
        main([*command, *more])
    assert end.value.code == 0 and "key frames of 2 videos" in capsys.readouterr().out


def test_another_model_is_refused(tmp_path):
    from rvos_nb.decompose import small_language_model

    for part in small_language_model(WORDS):
        part.save_pretrained(tmp_path)
    with pytest.raises(Problem):
        load_frame_text(tmp_path)
