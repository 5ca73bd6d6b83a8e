"""The search for a rule: counts against masks, no look at the videos that are scored,
luck is not reported as gain, and what it takes over is what it scored."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvos_nb.ballots import (
    Setting,
    fuse_settings,
    group_ballots,
    group_video,
    is_pixelwise,
    measure,
    open_ballots,
    read_ballots,
    region_similarity,
    usual_group_size,
)
from rvos_nb.candidates import save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.index import NoTruth
from rvos_nb.data.masks import write_tree
from rvos_nb.evaluate import evaluate
from rvos_nb.files import read_json
from rvos_nb.fuse import Rule, fuse, member_confidence
from rvos_nb.metrics import jaccard
from rvos_nb.search import deal_folds, search, search_record, search_table, start_setting
from rvos_nb.study import disagreement, leave_one_out, study

SIZE = (48, 72)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    refshapes.write(root / "data", "valid", "easy", videos=10, seed=3, frames=2, size=SIZE)
    return open_dataset(root / "data")


def ballots_of(root, members, split="valid"):
    return read_ballots(open_ballots(root, members, split))


class Member:
    """A member in memory: `says(video, expression) -> (T, H, W) bool`,
    and scores where it is asked for some."""

    def __init__(self, name, says, scores=None):
        self.where, self.name, self.says, self.sure = Path(name), name, says, scores

    def opinion(self, video, expression, frames, mode="vote", size=None):
        mask = self.says(video, expression)
        return mask if mode == "vote" else mask.astype(np.float32) * 0.8 + 0.1

    def scores(self, video, expression, frames):
        return self.sure and self.sure(video, expression)


def seeded(*key):
    return np.random.default_rng([int.from_bytes(str(k).encode(), "big") % 2**63 for k in key])


def careless(data, name, wrong):
    "A member that takes another object with probability `wrong`, and draws a pixel aside."
    by_id = {(e.video, e.id): e for e in data}

    def says(v, i):
        e, rng = by_id[v, i], seeded(name, v, i)
        others = list(dict.fromkeys(x.object_id for x in data.expressions[v]))
        if rng.random() < wrong:
            e = replace(e, object_id=others[others.index(e.object_id) - 1])
        return np.roll(data.masks(e), rng.integers(-1, 2, 2), (1, 2))

    return Member(name, says)


def noisy(data, m, scores=True):
    "A member of random rectangles, a few of them empty, with random scores."

    def says(v, i):
        rng = seeded(m, v, i)
        mask = np.zeros((2, *SIZE), bool)
        (y, x), (h, w) = rng.integers(0, 24, 2), rng.integers(0, 30, 2)
        mask[:, y : y + h, x : x + w] = True
        return mask

    return Member(
        f"noisy{m}",
        says,
        (lambda v, i: seeded("score", m, v, i).random(2, np.float32)) if scores else None,
    )


def plainly(b, setting, video):
    "A video fused by the rule itself, pixel by pixel, as the stage does it."
    frames, kept, rule = (
        b.data.videos[video].frames,
        setting.voters,
        setting.rule_for(usual_group_size(b, setting.rule)),
    )

    def opinion(m, e):
        return b.members[kept[m]].opinion(video, e, frames, rule.mode, SIZE)

    def sure(m, e):
        return member_confidence([b.members[k].scores(video, e, frames) for k in kept])[m]

    return {
        tuple(g): mask
        for g, mask in rule.fuse(
            opinion,
            group_video(b.data, video, rule.groups, lambda e: opinion(0, e) > 0.5),
            len(kept),
            sure,
        )
    }


def drawn(rng, members):
    "A random setting that is allowed."
    weights = rng.integers(0, 4, members) if rng.random() < 0.6 else rng.random(members).round(2)
    kind = rng.choice(["vote", "vote", "vote", "sure", "mean", "union"])
    weights = weights + (
        np.arange(members) == (0 if kind == "sure" else rng.integers(members))
    )  # member 1 keeps no scores
    rule = Rule(
        groups=str(rng.choice(["pairs", "matched", "objects", "none"])),
        guard=float(rng.choice([0, 0, 0.2])),
        leftover=rng.choice(["majority", "first"]).item(),
        mode="mean" if kind == "mean" else "vote",
        union=0.3 if kind == "union" else 0.0,
        confidence=bool(kind == "sure"),
        absent=0.45 if kind == "sure" and rng.random() < 0.5 else 0.0,
    )
    return Setting(
        tuple(weights.tolist()),
        None
        if kind in ("sure", "union") or rng.random() < 0.3
        else float(rng.choice([0.2, 0.35, 0.5, 0.8])),
        rule,
    )


@pytest.mark.parametrize("members", [2, 5, 9])
def test_patterns_decide_exactly_as_pixels(data, members):
    b = ballots_of(data.root, [noisy(data, m, scores=m != 1) for m in range(members)])
    rng, v = np.random.default_rng(members), list(data.videos)
    several = [drawn(rng, members) for _ in range(40)]
    for video in v[:2]:
        found = {}
        for who, group, mask in fuse_settings(b, video, several):
            for s in who:
                found.setdefault(s, {})[tuple(group)] = mask
        for s in several:
            want = plainly(b, s, video)
            assert found[s].keys() == want.keys(), s
            for group, mask in want.items():
                assert (found[s][group] == mask).all(), (s, group)
    scored = measure(b, several)
    for s in filter(lambda s: is_pixelwise(s.rule), several):
        j = region_similarity(b, s)
        assert np.allclose(j, scored[s][:, 0], rtol=0, atol=1e-12)
        e = b.expressions[0]
        mask = next(m for g, m in plainly(b, s, e.video).items() if e.id in g)
        assert j[0] == pytest.approx(jaccard(data.masks(e), mask).mean(), abs=1e-15)


def test_a_last_group_of_one_and_an_unusable_expression(tmp_path):
    """Leftovers keep their own rule,
    and a sentence that cannot be used keeps its place in the pairing."""
    refshapes.write(tmp_path / "data", "valid", "easy", videos=1, seed=3, frames=2, size=SIZE)
    path = tmp_path / "data/meta_expressions/valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    es = next(iter(listing["videos"].values()))["expressions"]
    es["0"]["exp"] = ""
    del es[list(es)[-1]]
    path.write_text(json.dumps(listing))
    data = open_dataset(tmp_path / "data")
    v = next(iter(data.videos))
    b = ballots_of(tmp_path / "data", [noisy(data, m) for m in range(4)])
    assert [f.split("/")[1] for f in b.faults] == ["0"] and group_ballots(b, Setting((1,) * 4))[v][
        0
    ] == ["1"]
    for leftover in ("majority", "first", 3.0):
        s = Setting((1,) * 4, rule=Rule(leftover=leftover))
        for _, group, mask in fuse_settings(b, v, [s]):
            assert (mask == plainly(b, s, v)[tuple(group)]).all()


def five(data):
    return [
        careless(data, n, w)
        for n, w in {"good": 0.1, "one": 0.4, "two": 0.4, "three": 0.4, "enemy": 1}.items()
    ]


@pytest.fixture(scope="module")
def ballots(data):
    return ballots_of(data.root, five(data))


def test_the_enemy_is_silenced_and_the_gain_is_clear(ballots):
    found = search(ballots)
    assert (
        found.clear
        and all(s.weights[4] == 0 for s in [*found.chosen, found.setting])
        and found.gain().low > 0
    )
    assert search_table(search(ballots)) == search_table(found) and json.dumps(
        search_record(search(ballots))
    ) == json.dumps(search_record(found))


def test_every_video_is_scored_by_a_setting_that_never_saw_it(data, ballots):
    """In the videos of one fold the best member becomes an enemy:
    what is chosen for that fold stays, what is chosen for others does not."""
    found, videos = search(ballots), ballots.videos()[0]
    fold = dict(zip(videos, deal_folds(videos, 5)))

    def poison(m, k):
        return lambda v, i: ~m.says(v, i) if fold[v] == k else m.says(v, i)

    for k in range(5):
        members = [Member(m.name, poison(m, k)) for m in five(data)]
        spoilt = search(ballots_of(data.root, members))
        assert spoilt.chosen[k] == found.chosen[k] and spoilt.best[k] == found.best[k]
        assert (
            spoilt.scores["tuned"][found.fold == k].mean()
            < 0.5
            < found.scores["tuned"][found.fold == k].mean()
        )  # the poison did reach the score

    def poison_the_good(m):
        return lambda v, i: ~m.says(v, i) if fold[v] != 0 and m.name == "good" else m.says(v, i)

    members = [Member(m.name, poison_the_good(m)) for m in five(data)]
    other = search(ballots_of(data.root, members))
    assert other.chosen[0] != found.chosen[0]


def test_luck_is_not_called_a_gain(data):
    """Members that change their seats in every video:
    nothing can be learnt, and held out nothing is gained on average."""
    gains = []

    def seat(m, seed):
        def says(v, i):
            order = seeded(seed, v).permutation(5)
            return five(data)[order[m]].says(v, i)

        return Member(f"seat{m}", says)

    for seed in range(6):
        found = search(
            ballots_of(data.root, [seat(m, seed) for m in range(5)]),
            Setting((1,) * 5, rule=Rule(groups="objects")),
        )
        gains.append(found.gain().mean)
        assert not found.clear, search_table(found)
    assert abs(np.mean(gains)) < 2 * np.std(gains, ddof=1) / 6**0.5


def test_masks_of_other_videos_are_worth_nothing(data):
    """True masks under wrong names: whatever is chosen stays near nothing,
    and no member is better than another."""
    names = [(e.video, e.id) for e in data]
    by_id = {(e.video, e.id): e for e in data}

    def stray(m):
        order = dict(zip(names, np.random.default_rng(m).permutation(len(names))))
        return Member(f"stray{m}", lambda v, i: data.masks(by_id[names[order[v, i]]]))

    found = search(ballots_of(data.root, [stray(m) for m in range(4)]))
    assert (
        all(found.scores[k].mean() < 0.2 for k in ("tuned", "given", "single"))
        and abs(found.gain().mean) < 0.1
    )


def candidates(data, folder, m, wrong):
    "A run with masks, candidates and scores; sure where it is right."
    member = careless(data, f"soft{m}", wrong)
    for e in data:
        mask, frames = member.says(e.video, e.id), list(data.videos[e.video].frames)
        right = jaccard(data.masks(e), mask).mean() > 0.3
        save_candidates(
            folder / "candidates" / e.video / f"{e.id}.safetensors",
            np.where(mask, 3, -2).astype(np.float32)
            + seeded(m, e.id).normal(0, 0.5, mask.shape).astype(np.float32),
            np.full(2, 0.8 if right else 0.3, np.float32),
            np.zeros((2, 4)),
            {"kind": "logit", "size": list(SIZE), "model": "toy", "frames": frames},
        )
        (folder / "Annotations" / e.video / e.id).mkdir(parents=True)
        write_tree(folder / "Annotations" / e.video / e.id, frames, mask)
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    return [
        candidates(data, tmp_path_factory.mktemp("run") / f"m{m}", m, 0.3 + 0.1 * m)
        for m in range(3)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "mean"},
        {"union": 1.0, "confidence": True},
        {"rule": "round1", "threshold": 3, "guard": 0.3},
    ],
    ids=str,
)
def test_what_is_taken_over_is_what_was_scored(data, runs, tmp_path, options):
    best, text = study(data.root, runs, tmp_path / "study", **options)
    said = read_json(tmp_path / "study/search.json")
    assert said["parameters"] == best and sorted(
        p.name for p in (tmp_path / "study").iterdir()
    ) == ["alike.png", "disagreement.png", "gain.png", "search.json", "worth.png"]
    fuse(data.root, out_dir=tmp_path / "tuned", **best).check()
    fuse(data.root, runs, tmp_path / "given", **options).check()
    tuned, given = (evaluate(data.root, tmp_path / r, "")["J&F"] for r in ("tuned", "given"))
    assert tuned - given == pytest.approx(
        said["gain_where_chosen"], abs=1e-3
    ) and given == pytest.approx(said["held_out"]["given"], abs=1e-3)
    if not options:
        assert best.get("confidence") and said["clear"] and "The gain is clear." in text


def test_leave_one_out_and_likeness(data):
    good, one, two, _, enemy = five(data)
    copy = Member("copy", one.says)
    b = ballots_of(data.root, [good, one, two, copy, enemy])
    whole, rows = leave_one_out(b)
    for m, row in enumerate(rows):
        rest = ballots_of(
            data.root, [x for i, x in enumerate([good, one, two, copy, enemy]) if i != m]
        )
        assert row.without == pytest.approx(
            measure(rest, [start_setting(rest)])[start_setting(rest)].mean()
        ) and row.worth.mean == pytest.approx(whole - row.without)
    assert rows[1].alone == rows[3].alone and rows[4].worth.high < 0
    alike = disagreement(b).alike
    frames = [data.videos[e.video].frames for e in data]
    want = np.mean(
        [
            jaccard(one.opinion(e.video, e.id, f), two.opinion(e.video, e.id, f)).mean()
            for e, f in zip(data, frames)
        ]
    )
    assert alike[1, 3] == pytest.approx(1) and alike[1, 2] == alike[2, 1] == pytest.approx(want)


def test_too_few_videos(data, ballots):
    few = Path(data.root).parent / "few"
    refshapes.write(few, "valid", "easy", videos=3, seed=3, frames=2, size=SIZE)
    known = open_dataset(few)
    found = search(ballots_of(few, five(known)))
    assert (
        found.warnings
        and not found.clear
        and search_table(found).startswith("warning: 3 videos are too few")
        and len(found.chosen) == 3
    )
    with pytest.raises(Problem, match="folds"):
        search(ballots, folds=1)


def test_bad_input(data, tmp_path):
    with pytest.raises(Problem, match="17 members"):
        ballots_of(data.root, [noisy(data, m) for m in range(17)])
    with pytest.raises(Problem, match="named twice"):
        ballots_of(data.root, [noisy(data, 0)] * 2)
    refshapes.write(
        tmp_path / "mevis", "valid_u", "easy", videos=2, seed=1, frames=2, size=SIZE, layout="mevis"
    )
    mevis = open_dataset(tmp_path / "mevis", "valid_u")
    b = ballots_of(tmp_path / "mevis", [noisy(mevis, m) for m in range(2)], "valid_u")
    with pytest.raises(Problem, match="MeViS"):
        search(b)
    assert {s.rule.groups for s in search(b, start_setting(b, groups="none"), folds=2).chosen} == {
        "none"
    }
    refshapes.write(
        tmp_path / "a2d",
        "test",
        "easy",
        videos=1,
        seed=1,
        frames=3,
        size=SIZE,
        layout="a2d-sentences",
    )
    with pytest.raises(Problem, match="single frames"):
        ballots_of(tmp_path / "a2d", five(data), "test")

    def lost(v, i):
        raise Problem("x.png", "no such file", "a mask", "write it")

    with pytest.raises(NoTruth, match="no such file"):
        ballots_of(data.root, [noisy(data, 0), Member("lost", lost)])


def test_the_presence_gate_is_calibrated(tmp_path):
    "Members always draw something, and are less sure where nobody is meant: the level is found."
    options = {"seed": 2, "frames": 2, "size": SIZE, "layout": "mevis"}
    refshapes.write(tmp_path / "d", "valid_u", "easy", videos=12, **options)
    data = open_dataset(tmp_path / "d", "valid_u")
    by_id = {(e.video, e.id): e for e in data}

    def make(name):
        def says(v, i):
            mask = data.masks(by_id[v, i]).copy()
            if not mask.any():
                mask[:, :9, :9] = True
            return np.roll(mask, seeded(name, v, i).integers(-1, 2, 2), (1, 2))

        def sure(v, i):
            level = 0.25 if by_id[v, i].object_id == "none" else 0.75
            return level + 0.2 * (seeded("sure", name, v, i).random(2, np.float32) - 0.5)

        return Member(name, says, sure)

    b = ballots_of(tmp_path / "d", [make("a"), make("b")], "valid_u")
    found = search(b, start_setting(b, groups="none"), folds=3)
    assert found.clear and found.setting.rule.confidence
    assert 0.25 < found.setting.rule.absent < 0.65
    assert all(0.25 < s.rule.absent < 0.7 for s in found.chosen)


def test_command(data, runs, tmp_path, capsys, monkeypatch):
    from rvos_nb.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        main(
            [
                "fuse",
                str(data.root),
                *map(str, runs[:2]),
                "--search",
                "--folds",
                "3",
                "--out",
                "found",
            ]
        )
    except SystemExit as e:
        assert not e.code
    said = capsys.readouterr().out
    assert (
        "least agreement" in said
        and said.strip().splitlines()[-1].startswith("to fuse by the chosen setting: rvos fuse")
        and not (tmp_path / "found/Annotations").exists()
    )
