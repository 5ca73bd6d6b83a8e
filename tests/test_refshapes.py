"""RefShapes: every sentence is true of one object only, or of the set that it names,
the written bytes repeat, bad arguments are refused."""

import hashlib

import numpy as np
import pytest

from rvos_nb.core import Problem
from rvos_nb.data.refshapes import video_seed, write
from rvos_nb.data.scenes import WORDS, Judge, draw_sets, holds, parse_sentence, scene
from rvos_nb.data.shapes import COLOURS, LEVEL_SETTINGS, SENTENCE_KINDS
from rvos_nb.files import read_json


@pytest.mark.parametrize("level", LEVEL_SETTINGS)
@pytest.mark.parametrize(
    "frames,size",
    [
        (1, (96, 144)),
        (3, (48, 72)),
        (4, (96, 144)),
        (12, (96, 144)),
        (20, (80, 60)),
        (40, (64, 64)),
    ],
)
def test_every_sentence_is_true_of_its_object_only(level, frames, size):
    kinds = set()
    for seed in range(1000, 1020):
        s = scene(seed, level, frames, size)
        judge, n = Judge(s), len(s.facts)
        assert LEVEL_SETTINGS[level].count[0] <= n <= LEVEL_SETTINGS[level].count[1]
        assert [e.object_id for e in s.expressions] == [k // 2 + 1 for k in range(2 * n)]
        for a, b in zip(s.expressions[::2], s.expressions[1::2]):
            assert a.text.split()[1:] != b.text.split()[1:]
        for e in s.expressions:
            assert [holds(judge, e.text, k + 1) for k in range(n)] == [
                k + 1 == e.object_id for k in range(n)
            ], (seed, e)
            assert set(e.text.split()) <= set(WORDS)
            kinds.add(e.kind)
    assert kinds == {
        k for k in LEVEL_SETTINGS[level].kinds if k != "motion" or frames >= 3
    } and kinds <= set(SENTENCE_KINDS)


@pytest.mark.parametrize("level", LEVEL_SETTINGS)
def test_a_set_is_what_the_judge_says(level):
    """Several objects or none, never one, each sentence true of exactly those that it names;
    also of a short clip and of one picture."""
    asked = {"several": 0, "none": 0}
    told_by_motion = 0
    for seed in range(2000, 2060):
        s = scene(seed, level, (12, 4, 1)[seed % 3], (48, 72))
        judge, n = Judge(s), len(s.facts)
        sets = draw_sets(s)
        assert [e.kind for e in sets] == sorted((e.kind for e in sets), reverse=True)
        assert {e.kind for e in sets} == set(asked) and len({e.text for e in sets}) == len(sets)
        for e in sets:
            asked[e.kind] += 1
            assert (e.kind == "several") == (len(e.object_ids) >= 2)
            assert (e.kind == "none") == (e.object_ids == ())
            assert list(e.object_ids) == sorted(set(e.object_ids))
            assert "both" not in e.text.split() or len(e.object_ids) == 2
            assert [holds(judge, e.text, k + 1) for k in range(n)] == [
                k + 1 in e.object_ids for k in range(n)
            ], (seed, e)
            assert set(e.text.split()) <= set(WORDS)
            told_by_motion += bool({"moving", "growing", "spinning", "still"} & {*e.text.split()})
    assert min(asked.values()) >= 110
    assert (told_by_motion > 10) == ("motion" in LEVEL_SETTINGS[level].kinds)


def test_sets_are_drawn_from_dice_of_their_own():
    "Asked for or not, a scene stays the same; asked for twice, so do they; and ways can be named."
    s = scene(5, "hard", 4)
    expressions = list(s.expressions)
    sets = draw_sets(s)
    assert draw_sets(s) == sets == draw_sets(scene(5, "hard", 4))
    assert s.expressions == expressions == scene(5, "hard", 4).expressions
    assert any(draw_sets(scene(k, "hard", 4)) != sets for k in range(5))
    for seed in range(20):
        for e in draw_sets(scene(seed, "hard", 4), ("appearance", "place")):
            assert not {"moving", "growing", "spinning", "standing", "going"} & {*e.text.split()}


def test_some_that_mean_nobody_are_hard():
    "Every part of them occurs, only not together; others name what nobody has."
    hard = easy = 0
    for seed in range(60):
        s = scene(seed, "easy", 2, (48, 72))
        known = {word for t in s.facts for word in (t.shape, t.colour, t.texture, t.size)}
        for e in draw_sets(s):
            if e.kind == "none":
                words = set(parse_sentence(e.text)[1]) - {"object", "thing"}
                hard += words <= known
                easy += not words <= known
    assert hard > 2 * easy > 20


def test_the_judge_can_say_no():
    "A sentence with one word exchanged is no longer true of its object."
    changed = 0
    for seed in range(40):
        s = scene(seed, "easy", 4)
        judge = Judge(s)
        for e in s.expressions:
            for colour in set(COLOURS) & set(e.text.split()):
                other = next(c for c in COLOURS if c != colour)
                assert holds(judge, e.text.replace(colour, other), e.object_id) is False
                changed += 1
    assert changed > 100


def test_labels_show_the_objects_that_the_facts_tell():
    "The centre of mass of an unhidden, upright object lies near its track, in its colour."
    for seed in range(20):
        s = scene(seed, "easy", 4)
        for k, t in enumerate(s.facts):
            for f in range(4):
                y, x = np.nonzero(s.labels[f] == k + 1)
                assert (
                    abs(x.mean() - t.x[f] * 96 / 4096) < 4
                    and abs(y.mean() - t.y[f] * 96 / 4096) < 4
                )
                seen = s.frames[f][s.labels[f] == k + 1].astype(int)
                rgb = np.array(COLOURS[t.colour])
                assert ((seen == rgb).all(1) | (seen == rgb * 2 // 5).all(1)).all()


def test_easy_objects_stay_visible():
    for seed in range(40):
        s = scene(seed, "easy", 12)
        assert all((s.labels == k + 1).any((1, 2)).all() for k in range(len(s.facts)))


def test_pixels_never_depend_on_the_order_of_calls():
    a = scene(5, "hard", 6)
    scene(6, "easy", 2)
    b = scene(5, "hard", 6)
    assert (
        a.frames.tobytes() == b.frames.tobytes()
        and a.labels.tobytes() == b.labels.tobytes()
        and a.expressions == b.expressions
    )
    assert scene(5, "hard", 6).frames.tobytes() != scene(7, "hard", 6).frames.tobytes()


def tree(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_two_writes_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, "valid", "all", 6, seed=3, frames=4)
    first = tree(tmp_path / "a")
    assert first == tree(tmp_path / "b") and len(first) == 6 * 4 * 2 + 3
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "valid").rglob("*.jpg")}
    write(tmp_path / "a", "valid", "all", 6, seed=3, frames=4)
    assert tree(tmp_path / "a") == first and all(
        p.stat().st_mtime_ns == t for p, t in stamp.items()
    )


def test_an_interrupted_write_goes_on(tmp_path):
    write(tmp_path / "whole", "train", "medium", 3, seed=3, frames=3)
    write(tmp_path / "cut", "train", "medium", 2, seed=3, frames=3)
    (tmp_path / "cut" / "meta_expressions" / "train" / "meta_expressions.json").unlink()
    write(tmp_path / "cut", "train", "medium", 3, seed=3, frames=3)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_written_layout(tmp_path):
    write(tmp_path, "valid", "hard", 2, seed=9, frames=3, size=(64, 96))
    videos = read_json(tmp_path / "meta_expressions/valid/meta_expressions.json")["videos"]
    assert [v["frames"] for v in videos.values()] == [["00000", "00005", "00010"]] * 2
    for name, v in videos.items():
        assert list(v["expressions"]) == [str(k) for k in range(len(v["expressions"]))]
        assert all(set(e) == {"exp", "obj_id", "kind"} for e in v["expressions"].values())
        objects = read_json(tmp_path / "valid/meta.json")["videos"][name]["objects"]
        assert sorted(objects) == sorted({e["obj_id"] for e in v["expressions"].values()})


def test_splits_never_share_a_scene():
    assert (
        len(
            {
                video_seed(seed, split, i)
                for seed in range(3)
                for split in ("train", "valid", "test")
                for i in range(50)
            }
        )
        == 450
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"level": "simple"},
        {"seed": -1},
        {"frames": 0},
        {"size": (16, 16)},
        {"size": (64, 640)},
    ],
)
def test_bad_arguments_give_one_line(bad):
    with pytest.raises(Problem) as e:
        scene(**{**{"seed": 0, "level": "easy", "frames": 2}, **bad})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [{"split": "../x"}, {"level": "simple"}, {"videos": 0}])
def test_write_refuses(tmp_path, bad):
    with pytest.raises(Problem):
        write(tmp_path, **{**{"split": "valid", "level": "easy", "videos": 1, "seed": 0}, **bad})
    assert not list(tmp_path.iterdir())


def test_other_scenes_are_not_mixed_in(tmp_path):
    write(tmp_path, "valid", "easy", 1, seed=0, frames=2)
    for other in ({"seed": 1}, {"frames": 3}, {"level": "hard"}):
        with pytest.raises(Problem):
            write(
                tmp_path,
                **{
                    **{"split": "valid", "level": "easy", "videos": 1, "seed": 0, "frames": 2},
                    **other,
                },
            )
