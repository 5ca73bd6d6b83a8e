"""Training clips of data sets: samples, frames, augmentation, batches by part, and bad input."""

import json
import logging
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from rvos_nb.core import Problem
from rvos_nb.data import refshapes, sampling, training
from rvos_nb.data.augment import AUGMENTATIONS, draw_geometry, swap_sides
from rvos_nb.data.clips import SceneStage, Stream, compute_boxes, make_generator
from rvos_nb.data.masks import write_labels
from rvos_nb.data.shapes import SHAPE_NAMES
from rvos_nb.data.training import ClipStage, list_batch

SMALL = {"sizes": [48, 64, 80], "long": 120, "clips": 4}
PLAIN = {"sizes": [48], "long": 120, "clips": 4, "augment": ""}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "RefShapes in all layouts, under their names; videos of two sizes in that of YouTube-VOS."
    base = tmp_path_factory.mktemp("trees")
    for name, splits in refshapes.LAYOUT_SPLITS.items():
        refshapes.write(base / name, next(iter(splits)), "all", 3, 1, 7, (48, 72), name)
    return base


def source(trees, name="ref-youtube-vos", **settings):
    return {
        "folder": str(trees / name),
        "split": next(iter(refshapes.LAYOUT_SPLITS[name])),
    } | settings


def assert_same(a, b, clip=0, padded=False):
    "Clip `clip` of batch `a` is the only one of batch `b`."
    h, w = a.sizes[clip]
    assert b.sizes.tolist() == [[h, w]] and b.texts == [a.texts[clip]]
    assert (a.frames[clip, :, :h, :w] == b.frames[0, :, :h, :w]).all()
    assert (a.masks[clip, :, :h, :w] == b.masks[0, :, :h, :w]).all()
    for field in ("boxes", "valid", "labels"):
        assert (getattr(a, field)[clip] == getattr(b, field)[0]).all()


# The same batch, however it is drawn


@pytest.mark.parametrize("augment", ["referformer", "soc"])
def test_a_batch_is_the_same_in_any_number_of_parts(trees, augment):
    stage = ClipStage([source(trees)], augment=augment, **SMALL)
    whole = stage.batch(3, 1)
    for parts in (2, 4):
        drawn = [stage.batch(3, 1, part, parts) for part in range(parts)]
        assert [text for own in drawn for text in own.texts] == whole.texts
    for clip, own in enumerate(drawn):
        assert_same(whole, own, clip)
    again, other = stage.batch(3, 1), stage.batch(4, 1)
    assert (again.frames == whole.frames).all() and again.texts == whole.texts
    assert other.frames.shape != whole.frames.shape or (other.frames != whole.frames).any()


def test_processes_draw_what_one_process_draws(trees):
    stages = [ClipStage([source(trees)], steps=2, **SMALL), ClipStage([source(trees)], **SMALL)]
    alone = Stream("refer", 5, stages)
    for world in (2, 4):
        streams = [Stream("refer", 5, stages, rank, world) for rank in range(world)]
        for step in (0, 3):
            parts = [pair for stream in streams for pair in stream[step]]
            assert [part for part, _ in parts] == [part for part, _ in alone[step]]
            for (_, a), (_, b) in zip(parts, alone[step]):
                assert a.texts == b.texts and (a.frames == b.frames).all()
                assert (a.masks == b.masks).all()
    with pytest.raises(Problem, match="3 processes"):
        Stream("refer", 5, stages, 0, 3)


def test_workers_draw_what_this_process_draws(trees):
    from rvos_nb.train.loop import draw_batches

    stream = Stream("refer", 1, [ClipStage([source(trees)], steps=3, **SMALL)])
    here, there = list(draw_batches(stream, 0)), list(draw_batches(stream, 0, workers=1))
    assert len(here) == len(there) == 3
    for own, drawn in zip(here, there):
        for (_, a), (_, b) in zip(own, drawn):
            assert a.texts == b.texts and (a.frames == b.frames).all()


def test_a_scene_stage_is_drawn_by_sample():
    stage = SceneStage(4, clips=4, micro=2, size=(32, 48))
    assert stage.parts == 2 and stage.count_steps() == 4
    whole = Stream("refer", 2, [stage])[1]
    halves = [Stream("refer", 2, [stage], rank, 2)[1] for rank in (0, 1)]
    assert [part for part, _ in whole] == [0, 1] == [half[0][0] for half in halves]
    for (_, a), ((_, b),) in zip(whole, halves):
        assert (a.frames == b.frames).all() and a.texts == b.texts


# What a batch holds


@pytest.mark.parametrize("name", refshapes.LAYOUT_SPLITS)
def test_every_layout_gives_a_batch(trees, name):
    rule = "centre" if name in sampling.ONE_FRAME_LAYOUTS else "around"
    stage = ClipStage([source(trees, name)], sampling=rule, **SMALL)
    for step in range(min(stage.count_steps(), 2)):
        b = stage.batch(0, step)
        masks = 1 if name in sampling.ONE_FRAME_LAYOUTS else 5
        e, (h, w) = 4, b.frames.shape[2:4]
        assert b.frames.shape[:2] == (4, 5) and b.frames.dtype == np.uint8
        assert b.masks.shape == (e, masks, h, w) and b.boxes.shape == (e, masks, 4)
        assert b.valid.shape == (e, masks) and b.valid.any(1).all()
        assert b.annotated == (None if masks == 5 else [2] * 4)
        assert b.clip.tolist() == [0, 1, 2, 3] and b.labels.tolist() == [0] * 4
        assert all(text == " ".join(text.lower().split()) for text in b.texts)


def test_sentences_about_several_are_trained_on_and_those_about_nobody_are_not(tmp_path):
    refshapes.write(tmp_path, "grefcoco_train", "easy", 3, 1, 4, (48, 72), "refcoco")
    tree = {"folder": str(tmp_path), "split": "grefcoco_train"}
    stage = ClipStage([tree], sampling="centre", **SMALL)
    (anchors,) = stage.list_anchors()
    kinds = [a.expression.kind for a in anchors]
    assert "none" not in kinds and kinds.count("several") >= 3
    b = stage.batch(0, 0)
    assert b.valid.any(1).all() and b.masks.any((1, 2, 3)).all()


@pytest.mark.parametrize("pad_to", [1, 32])
def test_mixed_sizes_are_padded_and_boxes_fit_their_masks(trees, tmp_path, pad_to):
    refshapes.write(tmp_path / "tall", "train", "all", 3, 2, 7, (96, 64))
    tall = {"folder": str(tmp_path / "tall")}
    stage = ClipStage([source(trees), tall], pad_to=pad_to, **SMALL | {"clips": 8})
    b = stage.batch(0, 0)
    assert len({tuple(size) for size in b.sizes}) > 2
    height, width = b.frames.shape[2:4]
    assert (height, width) == tuple(-(-n // pad_to) * pad_to for n in b.sizes.max(0))
    for i, (h, w) in enumerate(b.sizes):
        for field in (b.frames, b.masks):
            assert not field[i, :, h:].any() and not field[i, :, :, w:].any()
        boxes = compute_boxes(b.masks[i, :, :h, :w])
        valid = (boxes[:, 2:] > 0).all(1)
        assert (b.valid[i] == valid).all() and (b.boxes[i] == boxes * valid[:, None]).all()


def test_annotated_frames_are_where_they_should_be(trees):
    "The mask of a clip of A2D is that of its annotated frame, whatever stands around it."
    for rule in ("around", "centre"):
        stage = ClipStage([source(trees, "a2d-sentences")], sampling=rule, **PLAIN)
        for step in range(3):
            b, numbers = stage.batch(0, step), list_batch(stage, 0, step, 1)
            for i, number in enumerate(numbers):
                anchor = stage.list_anchors()[0][number]
                data = sampling.open_source(stage.read_sources()[0])
                video = data.videos[anchor.expression.video]
                film = sampling.read_clip_frames(video, [anchor.frame], (48, 72), "here")
                assert (b.frames[i, b.annotated[i], :48, :72] == film[0]).all()
                assert (b.masks[i, 0, :48, :72] == data.masks(anchor.expression)[0]).all()


def test_a_still_of_a_film_has_all_its_masks(trees):
    stage = ClipStage([source(trees, "a2d-sentences")], sampling="still", frames=1, **PLAIN)
    b = stage.batch(0, 0)
    assert b.frames.shape[1] == b.masks.shape[1] == 1 and b.annotated is None


# Sentences


def test_words_are_swapped():
    text = "the bright dog left of the upright rightmost cat"
    assert swap_sides(text) == "the bright dog right of the upright leftmost cat"
    published = text.replace("left", "@").replace("right", "left").replace("@", "right")
    assert swap_sides(text, words=False) == published and "bleft" in published


@pytest.mark.parametrize("words", [True, False])
def test_sentence_and_picture_are_mirrored_together(trees, tmp_path, words):
    "Every sentence says on which half its object is, and goes on to be true."
    tree = tmp_path / "tree"
    shutil.copytree(trees / "ref-youtube-vos", tree)
    path = tree / "meta_expressions/train/meta_expressions.json"
    listing = json.loads(path.read_text())
    for name, video in listing["videos"].items():
        video["expressions"] = {"0": {"exp": "The  BRIGHT left", "obj_id": "1"}}
        labels = np.zeros((48, 72), np.uint8)
        labels[10:30, 5:30] = 1
        for frame in video["frames"]:
            write_labels(tree / f"train/Annotations/{name}/{frame}.png", labels)
    path.write_text(json.dumps(listing))
    stage = ClipStage(
        [{"folder": str(tree)}], augment="soc", words=words, steps=9, **SMALL | {"clips": 2}
    )
    sides = []
    for step in range(9):
        b = stage.batch(0, step)
        for text, box in zip(b.texts, b.boxes[:, 0]):
            other = box[0] > 0.5
            mirrored = "the bright right" if words else "the bleft right"
            assert text == (mirrored if other else "the bright left")
            sides.append(other)
    assert 0 < np.mean(sides) < 0.7


def test_categories_become_labels(trees):
    shapes = sorted(SHAPE_NAMES)
    stage = ClipStage([source(trees)], categories=shapes, **PLAIN)
    b, numbers = stage.batch(0, 0), list_batch(stage, 0, 0, 1)
    data = sampling.open_source(stage.read_sources()[0])
    for label, number in zip(b.labels, numbers):
        expression = stage.list_anchors()[0][number].expression
        assert shapes[label] == sampling.describe_object(data, expression)["category"]
    assert len(set(b.labels)) > 1
    with pytest.raises(Problem, match=r"^.*meta.json, video .*category '\w+' of object"):
        replace(stage, categories="youtube-vos").batch(0, 0)


# Epochs


def test_an_epoch_shows_every_sample_once(trees):
    stage = ClipStage([source(trees), source(trees, "refcoco")], epochs=2, **SMALL)
    count = sum(map(len, stage.list_anchors()))
    for drop_last, batches in ((True, count // 4), (False, -(-count // 4))):
        stage = replace(stage, drop_last=drop_last)
        assert stage.count_steps() == 2 * batches
        seen = [list_batch(stage, 7, step, 1) for step in range(2 * batches)]
        for epoch in (seen[:batches], seen[batches:]):
            numbers = np.concatenate(epoch)
            assert len(set(numbers)) == (batches * 4 if drop_last else count)
        assert (seen[0] != seen[batches]).any()
    assert replace(stage, steps=5).count_steps() == 5


@pytest.mark.parametrize("micro, clips", [(1, 8), (2, 8), (0, 8), (4, 8)])
def test_the_last_batch_is_filled_up_to_equal_parts(monkeypatch, micro, clips):
    "As torch's DistributedSampler fills up: from the beginning of the epoch's order."
    stage = ClipStage([{"folder": "x"}], micro=micro, clips=clips, drop_last=False)
    monkeypatch.setattr(ClipStage, "list_anchors", lambda self: [range(21)])
    assert stage.count_batches() == 3
    order = training.order_epoch((21,), None, 0, 0)
    last = list_batch(stage, 0, 2, stage.parts)
    length = -(-5 // stage.parts) * stage.parts
    assert last.tolist() == [*order[16:], *order][:length]
    assert len(list_batch(stage, 0, 2, 4)) % 4 == 0


def test_shares(trees):
    sources = [source(trees, "refcoco", share=3, pseudo=True), source(trees, share=1)]
    stage = ClipStage(sources, **SMALL)
    counts = list(map(len, stage.list_anchors()))
    epoch = training.order_epoch(tuple(counts), (3.0, 1.0), 0, 0)
    assert len(epoch) == sum(counts)
    assert abs((epoch < counts[0]).sum() - 0.75 * sum(counts)) <= 1
    often = np.bincount(epoch, minlength=sum(counts))
    assert np.ptp(often[: counts[0]]) <= 1 and np.ptp(often[counts[0] :]) <= 1
    assert stage.batch(0, 0).frames.shape[:2] == (4, 5)


# Which frames


def draw_as_published(frame_id, vid_len, num_frames, rng):
    "The rule in the words of the spec, with Python's generator."
    sample = [frame_id, max(0, frame_id - rng.randint(1, 3))]
    sample.append(min(vid_len - 1, frame_id + rng.randint(1, 3)))
    if num_frames > 3:
        outside = list(range(vid_len))[: min(sample)] + list(range(vid_len))[max(sample) :]
        wanted = num_frames - 3
        if len(outside) > wanted:
            sample += rng.sample(outside, wanted)
        elif vid_len >= wanted:
            sample += rng.sample(range(vid_len), wanted)
        else:
            sample += [*range(vid_len), *rng.choices(range(vid_len), k=wanted - vid_len)]
    return sorted(sample)


@pytest.mark.parametrize(
    "f, n, frames", [(0, 20, 5), (10, 20, 5), (19, 20, 8), (2, 4, 5), (0, 1, 5)]
)
def test_around_is_the_published_rule(f, n, frames):
    "Both rules draw the same clips, equally often."
    ours, theirs = np.random.default_rng(0), random.Random(0)
    a = [tuple(sampling.sample_around(f, n, frames, ours)) for _ in range(4000)]
    b = [tuple(draw_as_published(f, n, frames, theirs)) for _ in range(4000)]
    frequencies = [np.bincount(np.ravel(clips), minlength=n) / 4000 for clips in (a, b)]
    assert abs(frequencies[0] - frequencies[1]).max() < 0.06
    assert all(f in clip and len(clip) == frames for clip in a)
    if f == 0:
        assert all(clip[:2] == (0, 0) for clip in a)
    assert {len(set(clip)) for clip in a} == {len(set(clip)) for clip in b}


def test_around_of_short_clips():
    rng = np.random.default_rng(0)
    assert sampling.sample_around(3, 9, 1, rng) == [3]
    for _ in range(20):
        assert 3 in sampling.sample_around(3, 9, 2, rng)


@pytest.mark.parametrize("n", [1, 3, 8, 9, 16, 21])
def test_windows_cover_a_video(n):
    starts = sampling.list_starts(n, 8, whole=True)
    clips = [sampling.sample_window(start, n, 8) for start in starts]
    assert sorted({t for clip in clips for t in clip}) == list(range(n))
    assert clips[-1][-1] == n - 1 and all(len(clip) == 8 for clip in clips)
    if n >= 8:
        assert all(clip == list(range(clip[0], clip[0] + 8)) for clip in clips)
        assert clips[-1] == list(range(n - 8, n))
    else:
        assert clips == [[*range(n), *[n - 1] * (8 - n)]]


def test_windows_without_the_object_are_dropped(trees, tmp_path):
    for with_list in (True, False):
        tree = tmp_path / str(with_list)
        shutil.copytree(trees / "ref-youtube-vos", tree)
        meta = json.loads((tree / "train/meta.json").read_text())
        name, video = next(iter(meta["videos"].items()))
        video["objects"]["1"]["frames"] = ["00000", "00005"]
        (tree / "train/meta.json").write_text(json.dumps(meta))
        if not with_list:
            (tree / "train/meta.json").unlink()
            for t in range(2, 7):
                empty = np.zeros((48, 72), np.uint8)
                write_labels(tree / f"train/Annotations/{name}/{5 * t:05d}.png", empty)
        anchors = sampling.list_anchors(sampling.ClipSource(str(tree)), "window", 3)
        own = [a for a in anchors if a.expression.video == name and a.expression.object_id == "1"]
        assert {a.frame for a in own} == {0}


# Pseudo-clips, and what transforms do on the whole


def test_pseudo_clips_keep_their_masks(trees):
    stage = ClipStage([source(trees, "refcoco", pseudo=True)], frames=6, **PLAIN)
    b = stage.batch(0, 0)
    assert b.frames.shape[1] == b.masks.shape[1] == 6 and b.annotated is None
    assert b.masks.any((2, 3)).mean() > 0.7
    for i, number in enumerate(list_batch(stage, 0, 0, 1)):
        data = sampling.open_source(stage.read_sources()[0])
        e = stage.list_anchors()[0][number].expression
        picture = sampling.read_clip_frames(data.videos[e.video], [0], (48, 72), "here")[0]
        own = [(frame[:48, :72] == picture).all() for frame in b.frames[i]]
        assert sum(own) == 1
        assert (b.masks[i, own.index(True), :48, :72] == data.masks(e)[0]).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_how_often_clips_are_flipped_and_cropped(name):
    how, rng = AUGMENTATIONS[name], make_generator(0, 0, 0)
    for still, share in ((False, how.flip), (True, how.flip_still or how.flip)):
        plans = [draw_geometry((480, 854), how, rng, still) for _ in range(3000)]
        assert abs(np.mean([p.flip for p in plans]) - share) < 0.03
        assert abs(np.mean([p.crop[2:] != (480, 854) for p in plans]) - how.crop) < 0.03
        for p in plans:
            y, x, height, width = p.crop
            assert y >= 0 and x >= 0 and y + height <= 480 and x + width <= 854
            whole = height == 480 and width == 854
            assert max(p.size) <= (how.long if whole else how.crop_long or how.long)


# Bad input


def test_damage_costs_a_sample_and_is_named_once(trees, tmp_path, caplog):
    tree = tmp_path / "tree"
    shutil.copytree(trees / "ref-youtube-vos", tree)
    name = sorted(p.name for p in (tree / "train/Annotations").iterdir())[0]
    for path in (tree / f"train/Annotations/{name}").iterdir():
        write_labels(path, np.zeros((20, 20), np.uint8))
    stage = ClipStage([{"folder": str(tree)}], **PLAIN)
    with caplog.at_level(logging.WARNING, "rvos_nb"):
        for _ in range(2):
            for step in range(stage.count_steps()):
                assert stage.batch(0, step).valid.any(1).all()
    lines = [r.getMessage() for r in caplog.records if "left out of the training" in r.getMessage()]
    assert lines and len(set(lines)) == len(lines)
    assert all("20x20 pixels" in line and name in line for line in lines)


def test_data_that_cannot_be_used_at_all_ends_the_training(trees, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(trees / "ref-youtube-vos", tree)
    for path in (tree / "train/Annotations").rglob("*.png"):
        write_labels(path, np.zeros((48, 72), np.uint8))
    stage = ClipStage([{"folder": str(tree)}], **PLAIN)
    with pytest.raises(Problem, match=r"a hundred samples.*no object"):
        stage.batch(0, 0)
    shutil.rmtree(tree / "train/Annotations")
    (tree / "train/Annotations").mkdir()
    with pytest.raises(Problem, match=r"a hundred samples.*\.png"):
        stage.batch(0, 0)


def test_an_empty_sentence_is_left_out(trees, tmp_path, caplog):
    tree = tmp_path / "tree"
    shutil.copytree(trees / "ref-youtube-vos", tree)
    path = tree / "meta_expressions/train/meta_expressions.json"
    listing = json.loads(path.read_text())
    next(iter(listing["videos"].values()))["expressions"]["0"]["exp"] = "  "
    path.write_text(json.dumps(listing))
    with caplog.at_level(logging.WARNING, "rvos_nb"):
        anchors = ClipStage([{"folder": str(tree)}], **PLAIN).list_anchors()[0]
    assert "1 entries are left out" in caplog.text and "empty sentence" in caplog.text
    assert all(a.expression.text.strip() for a in anchors)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sampling": "arround"}, "did you mean 'around'"),
        ({"augment": "refformer"}, "did you mean 'referformer'"),
        ({"categories": "youtubevos"}, "did you mean 'youtube-vos'"),
        ({"sources": [{"folder": "x", "shares": 1}]}, "did you mean 'share'"),
        ({"sources": [{"folder": "x", "share": 0}]}, "above 0"),
        ({"sources": [{"folder": "x", "share": -1}]}, "above 0"),
        ({"sources": [{"folder": "x", "share": float("nan")}]}, "above 0"),
        ({"sources": [{"folder": "x", "share": 1}, {"folder": "y"}]}, "of none"),
        ({"sources": []}, "at least one"),
        ({"clips": 3, "micro": 2}, "divisor"),
        ({"micro": -1}, "micro"),
        ({"sampling": "still"}, "frames"),
        ({"sizes": [8]}, "sizes"),
        ({"pad_to": 0}, "pad_to"),
        ({"epochs": True}, "epochs"),
    ],
)
def test_a_bad_stage_is_refused(change, said):
    with pytest.raises(Problem, match=said):
        ClipStage(**{"sources": [{"folder": "x"}]} | change)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("nowhere", {}, "no such folder"),
        ("ref-youtube-vos", {"split": "valid"}, "no such file"),
        ("a2d-sentences", {"sampling": "window"}, "'centre' or 'around'"),
        ("ref-youtube-vos", {"sampling": "centre"}, "'window' or 'around'"),
        ("ref-youtube-vos", {"clips": 5000, "micro": 0}, "more than the"),
    ],
)
def test_data_that_do_not_fit_a_stage(trees, name, change, said):
    entry = {"folder": str(trees / name), "split": change.pop("split", "train")}
    with pytest.raises(Problem, match=said):
        ClipStage([entry], **PLAIN | change).count_steps()


def test_data_without_masks_are_refused(trees, tmp_path):
    for name, place in {
        "ref-youtube-vos": "train/Annotations",
        "mevis": "train/mask_dict.json",
        "a2d-sentences": "text_annotations/a2d_annotation_with_instances",
        "jhmdb-sentences": "puppet_mask",
    }.items():
        tree = tmp_path / name
        shutil.copytree(trees / name, tree)
        (tree / place).rename(tree / "away")
        entry = source(tmp_path, name)
        with pytest.raises(Problem, match="no masks") as e:
            ClipStage([entry], **PLAIN).count_steps()
        assert str(tree / place) in str(e.value) and "masks are public" in str(e.value)
