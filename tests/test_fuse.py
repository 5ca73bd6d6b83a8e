"Fusion: the golden rounds, the rule written out, what members may lack, and runs that were killed."

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from rvos_nb.candidates import save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask, write_mask, write_tree
from rvos_nb.data.video import Expression
from rvos_nb.files import read_json, write_json
from rvos_nb.fuse import (
    RULES,
    SAME_OBJECT,
    Rule,
    average,
    count_votes,
    find_clusters,
    fuse,
    group_expressions,
    member_confidence,
    overlap,
    pack_bits,
    pool_scores,
    unite_clusters,
    vote,
)
from rvos_nb.keyframe import as_json, choose_key_frames, from_json
from rvos_nb.members import foreground
from rvos_nb.verify.cases import compare, load_case
from rvos_nb.verify.pipeline import fusion_round1, fusion_round2

GOLDEN = Path(__file__).parent / "golden/pipeline"


@pytest.mark.parametrize(
    "name, run, count", [("fusion_round1", fusion_round1, 53), ("fusion_round2", fusion_round2, 16)]
)
def test_golden(name, run, count):
    case = load_case(GOLDEN / f"{name}.npz")
    verdict = compare(case, run(case.meta, case.arrays))
    assert verdict.ok and verdict.worst == 0 and verdict.count == count, verdict


def golden_videos(case):
    videos = json.loads(str(case.arrays["in/meta_expressions"]))["videos"]
    return {
        v: group_expressions([Expression(v, e, d["exp"]) for e, d in about["expressions"].items()])
        for v, about in videos.items()
    }


def test_round_one_by_its_name():
    """No threshold is given: half of six votes is what was published.
    The leftover of swap 2 is right with the right kind, and fills the frame with the wrong one."""
    case = load_case(GOLDEN / "fusion_round1.npz")
    for name, members in case.meta["config"]["members"].items():
        kinds = [case.meta["config"]["kind"][m] for m in members]
        for v, groups in golden_videos(case).items():

            def opinion(m, e, v=v, members=members, kinds=kinds):
                return foreground(case.arrays[f"in/{members[m]}/{v}/{e}/mask_logits"], kinds[m])

            variant = name if kinds[0] == "logit" else f"{name}_leftover_fixed"
            for group, mask in RULES["round1"].fuse(opinion, groups, len(members)):
                for e in group:
                    assert (
                        case.answers[f"{variant}/Annotations/{v}/{e}"] == mask * np.uint8(255)
                    ).all()
                if len(group) == 1 and kinds[0] == "probability":
                    published = case.answers[f"{name}/Annotations/{v}/{group[0]}"] > 0
                    assert (
                        published
                        == foreground(
                            case.arrays[f"in/{members[0]}/{v}/{group[0]}/mask_logits"], "logit"
                        )
                    ).all() and published.mean() > mask.mean() + 0.3


def test_round_two_by_its_name():
    case, made = load_case(GOLDEN / "fusion_round2.npz"), {}
    for name, members in case.meta["config"]["members"].items():
        for v, groups in golden_videos(case).items():

            def opinion(m, e, v=v, members=members):
                if members[m] in case.meta["config"]["members"]:
                    return made[members[m], v, e]
                return case.arrays[f"in/{members[m]}/{v}/{e}"] == 255

            for group, mask in RULES["round2"].fuse(opinion, groups, len(members)):
                for e in group:
                    made[name, v, e] = mask
                    assert (case.answers[f"{name}/{v}/{e}"] == mask * np.uint8(255)).all()


def blobs(rng, shape, n):
    "n masks that are noisy copies of two rectangles, and now and then empty."
    out = []
    for _ in range(n):
        m = np.zeros(shape, bool)
        if rng.random() < 0.9:
            h, w = shape[1:]
            x = 0 if rng.random() < 0.5 else w // 2
            m[:, : max(1, h // 2), x : x + max(1, w // 2)] = True
        out.append(m ^ (rng.random(shape) < 0.1))
    return out


def plain(opinions, w, alone, rule, conf):
    "The rule as the specification writes it, in float64, with everything in memory."
    w = np.array(w, float)
    if rule.confidence:
        if (w * conf).sum() < rule.absent * w.sum():
            return np.zeros(opinions[0].shape, bool)
        w = w * conf
    stack = np.stack(opinions).astype(float)
    if rule.union:
        left, found = set(range(len(opinions))), []

        def iou(i, j):
            return (
                1.0
                if not (stack[i] + stack[j]).any()
                else (stack[i] * stack[j]).sum() / np.maximum(stack[i], stack[j]).sum()
            )

        while left:
            seed = [min(left)]
            left -= set(seed)
            for i in seed:
                near = [j for j in sorted(left) if iou(i, j) >= SAME_OBJECT]
                seed += near
                left -= set(near)
            found.append(sorted(seed))
        heavy = [w[c].sum() for c in found]
        out = np.zeros(opinions[0].shape, bool)
        for c, weight in zip(found, heavy):
            if c is found[int(np.argmax(heavy))] or weight >= rule.union * w.sum() - 1e-9:
                out |= np.tensordot(w[c], stack[c], 1) >= weight / 2 - 1e-9
        return out
    votes = np.tensordot(w, stack, 1)
    if alone and isinstance(rule.leftover, float):
        return votes >= rule.leftover - 1e-9
    if rule.threshold is not None and not alone:
        return votes >= rule.threshold - 1e-9
    return votes > w.sum() / 2 + 1e-9 if alone else votes >= w.sum() / 2 - 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_rule_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    members, shape = int(rng.integers(1, 7)), tuple(rng.integers(1, (4, 9, 12)))
    groups = [["a", "b"], ["c"], ["d", "e", "f"]]
    said = {(m, e): x for m in range(members) for e, x in zip("abcdef", blobs(rng, shape, 6))}
    sure = {key: float(rng.random()) for key in said}
    rule = [
        Rule(),
        Rule(threshold=float(rng.integers(1, 2 * members + 1))),
        Rule(leftover=1.0),
        Rule(confidence=True),
        Rule(union=1.0),
        Rule(union=0.25, confidence=True),
        Rule(confidence=True, absent=0.5),
    ][seed % 7]
    if seed % 2:
        rule = replace(rule, weights=rng.integers(1, 5, members) / 2)
    got = {
        tuple(g): x
        for g, x in rule.fuse(lambda m, e: said[m, e], groups, members, lambda m, e: sure[m, e])
    }
    for g in groups:
        keys = [(m, e) for m in range(members) for e in g]
        w = [1 if rule.weights is None else rule.weights[m] for m, _ in keys]
        want = plain(
            [said[k] for k in keys], w, len(g) == 1, rule, np.array([sure[k] for k in keys])
        )
        assert (got[tuple(g)] == want).all() and got[tuple(g)].dtype == bool, (rule, g)
    first = {
        g[0]: x
        for g, x in replace(rule, leftover="first", absent=0).fuse(
            lambda m, e: said[m, e], [["c"]], members, lambda m, e: sure[m, e]
        )
    }
    assert (first["c"] == said[0, "c"]).all()


@pytest.mark.parametrize("seed", range(10))
def test_mean_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    members = int(rng.integers(1, 6))
    w = (rng.integers(1, 5, members) / 2).tolist()
    p = {(m, e): rng.random((2, 3, 4), np.float32) for m in range(members) for e in "abc"}
    for g, x in Rule(weights=w, mode="mean").fuse(
        lambda m, e: p[m, e], [["a", "b"], ["c"]], members
    ):
        want = sum(w[m] * p[m, e].astype(float) for m in range(members) for e in g) / (
            sum(w) * len(g)
        )
        assert ((x == (want > 0.5)) | (abs(want - 0.5) < 1e-6)).all()


def test_many_opinions_do_not_wrap_around():
    one = np.ones((1, 2, 2), bool)
    assert (
        (count_votes(one for _ in range(300))[0] == 300).all()
        and vote([one] * 300, threshold=300).all()
        and not vote([one] * 5, threshold=300).any()
    )
    assert (
        vote([one, ~one], [0.1, 0.1]).all() and not vote([one, ~one], [0.1, 0.1], strict=True).any()
    )
    assert (
        count_votes(np.ones((4, 6), bool)[::2, ::3][None] for _ in range(2))[0] == 2
    ).all()  # no contiguous array


def test_empty_and_misfitting_opinions():
    for combine in (vote, average, unite_clusters):
        with pytest.raises(Problem, match="none"):
            combine([])
        with pytest.raises(Problem, match="shape"):
            combine([np.ones((1, 2, 2), np.float32) > 0, np.ones((1, 2, 3), np.float32) > 0])


@pytest.mark.parametrize("seed", range(10))
def test_likeness_of_bits_is_that_of_masks(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    a, b = (rng.random(shape) < 0.4 for _ in "ab")
    want = (a & b).sum() / (a | b).sum() if (a | b).any() else 1
    assert overlap(a, b) == overlap(pack_bits(a), pack_bits(b)) == want


def test_the_guard_reads_the_first_member_only():
    left, right = np.zeros((2, 1, 4), bool), np.zeros((2, 1, 4), bool)
    left[..., :2] = right[..., 2:] = True
    said = {
        (0, "a"): left,
        (0, "b"): left,
        (1, "a"): left,
        (1, "b"): right,
        (0, "c"): left,
        (0, "d"): right,
        (1, "c"): left,
        (1, "d"): left,
    }

    def groups(guard, **rule):
        return [
            g
            for g, _ in Rule(guard=guard, **rule).fuse(
                lambda m, e: said[m, e], [["a", "b"], ["c", "d"]], 2
            )
        ]

    assert groups(0.3) == [["a", "b"], ["c"], ["d"]] and groups(0) == [["a", "b"], ["c", "d"]]
    assert [
        g
        for g, _ in Rule(guard=0.3, mode="mean").fuse(
            lambda m, e: said[m, e].astype(np.float32), [["c", "d"]], 2
        )
    ] == [["c"], ["d"]]


@pytest.mark.parametrize("n", range(1, 8))
def test_matched_pairs(n):
    """Whoever is the lone one among an odd number is found by the likeness of the others;
    an even number is always two by two."""
    expressions = [Expression("v", str(i), "it") for i in range(n)]
    if n % 2 == 0:

        def never(a, b):
            raise AssertionError("asked")

        assert group_expressions(expressions, "matched", alike=never) == group_expressions(
            expressions
        )
        return
    for lone in range(0, n, 2):
        order = [str(i) for i in range(n)]
        paired = order[:lone] + order[lone + 1 :]
        object_of = {i: k // 2 for k, i in enumerate(paired)} | {str(lone): -1}

        def likeness(a, b, object_of=object_of):
            return 0.8 if object_of[a] == object_of[b] else 0.1

        found = group_expressions(expressions, "matched", alike=likeness)
        assert [str(lone)] in found
        assert all(len({object_of[i] for i in group}) == 1 for group in found)
        assert list(chain.from_iterable(found)) == order


def test_matched_pairs_beside_an_unusable_sentence():
    "Sentence 1 of five cannot be used; 0 was its partner, and 2 is alone."
    usable = [Expression("v", i, "it") for i in ("0", "2", "3", "4")]
    assert group_expressions(
        usable, "matched", ["1"], lambda a, b: 0.9 if (a, b) == ("3", "4") else 0.0
    ) == [
        ["0"],
        ["2"],
        ["3", "4"],
    ]


def test_clusters_hang_together_through_others():
    rng = np.random.default_rng(0)
    for _ in range(20):
        masks = blobs(rng, (1, 6, 10), 8)
        found = find_clusters(masks, 0.3)
        assert sorted(chain.from_iterable(found)) == list(range(8))
        assert find_clusters(list(map(pack_bits, masks)), 0.3) == found
        for a in found:
            for b in found:
                assert a is b or all(overlap(masks[i], masks[j]) < 0.3 for i in a for j in b)


def test_confidence_where_scores_are_odd():
    assert member_confidence([np.float32([0.2, 0.4]), None]) == pytest.approx([0.3, 0.3])
    assert pool_scores([None, np.float32([np.nan, 1])]).tolist() == [0, 1]
    for scores, weights in (([None], None), ([np.ones(2), None], [0, 1])):
        with pytest.raises(Problem, match="keeps scores"):
            pool_scores(scores, weights)
    one, nothing = np.ones((1, 2, 2), bool), lambda m, e: 0.0
    assert [
        x.all() for _, x in Rule(confidence=True).fuse(lambda m, e: one, [["a", "b"]], 2, nothing)
    ] == [True]  # all equally unsure: all alike


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A small data set and two members that differ by a shift."
    root = tmp_path_factory.mktemp("fuse")
    refshapes.write(root / "data", "valid", "easy", videos=3, seed=3, frames=3, size=(64, 96))
    data = open_dataset(root / "data")
    for m, shift in (("m0", 0), ("m1", 3)):
        for v, es in data.expressions.items():
            for e in es:
                (root / m / "Annotations" / v / e.id).mkdir(parents=True)
                write_tree(
                    root / m / "Annotations" / v / e.id,
                    data.videos[v].frames,
                    np.roll(data.masks(e), shift, 2),
                )
    write_json(
        root / "m0" / "key_frame.json",
        as_json({v: {e.id: i % 3 for i, e in enumerate(es)} for v, es in data.expressions.items()}),
    )
    return root, data


@pytest.fixture
def copy(made, tmp_path):
    for m in ("m0", "m1", "data"):
        shutil.copytree(made[0] / m, tmp_path / m)
    return tmp_path, made[1]


def masks(run, data, v, e):
    return np.stack(
        [read_mask(run / "Annotations" / v / e / f"{f}.png") for f in data.videos[v].frames]
    )


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def soft_member(folder, data, draw, scores=lambda e: np.arange(3.0)):
    "A member with candidates only: logits of +5 where `draw(e)` is true."
    for e in data:
        x = np.where(draw(e), 5, -5).astype(np.float32)
        save_candidates(
            folder / "candidates" / e.video / f"{e.id}.safetensors",
            x,
            scores(e),
            np.zeros((len(x), 4)),
            {
                "kind": "logit",
                "size": list(x.shape[1:]),
                "model": "toy",
                "frames": list(data.videos[e.video].frames),
            },
        )
    return folder


def test_stage(copy):
    tmp, data = copy
    report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out", groups="objects").check()
    v = next(iter(data.videos))
    e = data.expressions[v][0].id
    assert (
        masks(tmp / "out", data, v, e)
        == masks(tmp / "m0", data, v, e) | masks(tmp / "m1", data, v, e)
    ).all()  # half of the votes, ties count
    assert len(report.done) == 3 and from_json(read_json(tmp / "out/key_frame.json")) == from_json(
        read_json(tmp / "m0/key_frame.json")
    )
    before = files(tmp / "out")
    assert (
        len(fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out", groups="objects").skipped)
        == 3
        and files(tmp / "out") == before
    )


def test_trees_zips_and_members_without_masks(copy):
    """A published tree has no Annotations level;
    a submission is a zip; a member may have candidates only."""
    tmp, data = copy
    with zipfile.ZipFile(tmp / "m1.zip", "w") as box:
        for p in sorted((tmp / "m1").rglob("*.png")):
            box.write(p, p.relative_to(tmp / "m1"))
    fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "plain").check()
    fuse(tmp / "data", [tmp / "m0", tmp / "m1.zip"], tmp / "zipped").check()
    assert files(tmp / "plain" / "Annotations") == files(tmp / "zipped" / "Annotations")
    (tmp / "m1/Annotations").rename(tmp / "Annotations_AOT_class_index")
    soft = soft_member(tmp / "soft", data, data.masks)
    assert {k for es in from_json(choose_key_frames(soft)).values() for k in es.values()} == {2}
    for mode in ("vote", "mean"):
        fuse(
            tmp / "data",
            [soft, tmp / "Annotations_AOT_class_index", tmp / "m0"],
            tmp / mode,
            mode=mode,
            groups="none",
        ).check()
        for e in data:
            assert (masks(tmp / mode, data, e.video, e.id) == data.masks(e)).all()
    assert from_json(read_json(tmp / "vote/key_frame.json"))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: shutil.rmtree(folder), "nothing of this member"),
        (lambda folder: sorted(folder.glob("*.png"))[1].unlink(), "no such"),
        (
            lambda folder: write_mask(sorted(folder.glob("*.png"))[1], np.ones((64, 95), bool)),
            "64x95",
        ),
        (lambda folder: sorted(folder.glob("*.png"))[1].write_bytes(b"\x89PNG\r\n\x1a\n"), "PNG"),
    ],
)
def test_a_member_with_a_hole_costs_one_video(copy, spoil, words):
    tmp, data = copy
    v = list(data.videos)[1]
    hurt = tmp / "m1/Annotations" / v / data.expressions[v][-1].id
    spoil(hurt)
    report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out")
    assert (
        list(report.failed) == [v]
        and words in report.failed[v]
        and str(tmp / "m1") in report.failed[v]
        and len(report.done) == 2
    )
    assert not (tmp / "out/Annotations" / v).exists() and not list(tmp.rglob(".tmp-*"))
    shutil.rmtree(hurt, ignore_errors=True)
    shutil.copytree(tmp / "m0/Annotations" / v / hurt.name, hurt)
    assert fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out").check().done == [v]


def test_a_member_of_fewer_frames(copy):
    tmp, data = copy
    soft, v = soft_member(tmp / "soft", data, data.masks), list(data.videos)[2]
    e = data.expressions[v][0]
    save_candidates(
        soft / "candidates" / v / f"{e.id}.safetensors",
        data.masks(e)[:2],
        np.arange(2.0),
        np.zeros((2, 4)),
        {
            "kind": "logit",
            "size": [64, 96],
            "model": "toy",
            "frames": list(data.videos[v].frames[:2]),
        },
    )
    report = fuse(tmp / "data", [tmp / "m0", soft], tmp / "out")
    assert list(report.failed) == [v] and "soft" in report.failed[v] and "2" in report.failed[v]


def test_other_members_are_refused(copy):
    """A tree that nobody recorded counts by its contents:
    what was fused from it does not silently stay."""
    tmp, data = copy
    fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out").check()
    e = next(iter(data))
    write_mask(
        tmp / "m1/Annotations" / e.video / e.id / f"{data.videos[e.video].frames[0]}.png",
        np.ones((64, 96), bool),
    )
    for members in ([tmp / "m0", tmp / "m1"], [tmp / "m0"]):
        with pytest.raises(Problem, match="force"):
            fuse(tmp / "data", members, tmp / "out")
    assert (
        len(fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out", force=True).check().done) == 3
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"member_dirs": []},
        {"member_dirs": ["m0", "none"]},
        {"weights": [1]},
        {"weights": [0, 0]},
        {"weights": [1, -1]},
        {"weights": [1, float("nan")]},
        {"weights": [1, float("inf")]},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"leftover": float("inf")},
        {"guard": float("nan")},
        {"mode": "max"},
        {"rule": "round3"},
        {"groups": "triples"},
        {"leftover": "last"},
        {"leftover": "0"},
        {"key_frame_member": 2},
        {"key_frame_member": "m2"},
        {"key_frames": "last"},
        {"threshold": -1},
        {"out_dir": "m0"},
        {"guard": -0.1},
        {"guard": 1.1},
        {"union": 2},
        {"absent": 0.3},
        {"union": 0.3, "mode": "mean"},
        {"union": 0.3, "threshold": 2},
        {"confidence": True, "threshold": 2},
        {"threshold": 5},
        {"threshold": 3, "groups": "none"},
        {"threshold": 4, "weights": [1, 0.5]},
        {"leftover": 3},
        {"mode": "mean", "threshold": 1},
        {"mode": "mean", "leftover": 2},
    ],
)
def test_wrong_parameters(made, tmp_path, wrong):
    given = {"member_dirs": ["m0", "m1"], "out_dir": tmp_path / "out"} | wrong
    given["member_dirs"] = [made[0] / m for m in given["member_dirs"]]
    if given["out_dir"] == "m0":
        given["out_dir"] = made[0] / "m0"
    with pytest.raises(Problem) as e:
        fuse(made[0] / "data", **given)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_rules_of_the_rounds_differ_in_the_leftover(copy):
    tmp, data = copy
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    v = next(iter(data.videos))
    last = data.expressions[v][-1].id
    del listing["videos"][v]["expressions"][last]
    write_json(path, listing)
    alone = data.expressions[v][-2].id
    for rule in ("round1", "round2"):
        fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / rule, rule=rule).check()
    m0, m1 = (masks(tmp / m, data, v, alone) for m in ("m0", "m1"))
    assert (masks(tmp / "round1", data, v, alone) == m0).all() and (
        masks(tmp / "round2", data, v, alone) == m0 & m1
    ).all()
    fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "one", rule="round1", leftover="1").check()
    assert (masks(tmp / "one", data, v, alone) == m0 | m1).all()


def test_published_files_and_the_leftover_of_swap_2(copy):
    """Probabilities under the name of logits: read as what they are,
    the expression left over is the first member's, and does not fill the frame."""
    import torch

    tmp, data = copy
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    v = next(iter(data.videos))
    del listing["videos"][v]["expressions"][data.expressions[v][-1].id]
    write_json(path, listing)
    alone = next(e for e in data.expressions[v] if e.id == data.expressions[v][-2].id)
    for name, low, high in (("soft", 0.2, 0.9), ("hard", -4.0, 3.0)):
        torch.save(
            {
                v: {
                    e.id: {
                        "mask_logits": torch.from_numpy(
                            np.where(np.roll(data.masks(e), name == "hard", 2), high, low).astype(
                                np.float32
                            )
                        ),
                        "class_info": [0.1, 0.9, 0.3],
                    }
                    for e in es
                }
                for v, es in data.expressions.items()
            },
            tmp / f"{name}.pth",
        )
    for rule in ("round1", "round2"):
        fuse(tmp / "data", [tmp / "soft.pth", tmp / "hard.pth"], tmp / rule, rule=rule).check()
        want = (
            data.masks(alone)
            if rule == "round1"
            else data.masks(alone) & np.roll(data.masks(alone), 1, 2)
        )
        assert (masks(tmp / rule, data, v, alone.id) == want).all() and want.mean() < 0.3
        assert {
            k
            for es in from_json(read_json(tmp / rule / "key_frame.json")).values()
            for k in es.values()
        } == {1}


def test_an_empty_sentence_keeps_its_place_in_the_pairs(copy):
    tmp, data = copy
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    v = next(iter(data.videos))
    listing["videos"][v]["expressions"]["1"]["exp"] = " "
    write_json(path, listing)
    report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out")
    assert list(report.failed) == [f"{v}/1"] and not (tmp / "out/Annotations" / v / "1").exists()

    def both(e):
        return masks(tmp / "m0", data, v, e) & masks(tmp / "m1", data, v, e)

    assert (
        masks(tmp / "out", data, v, "0") == both("0")
    ).all()  # alone now: a strict majority of two
    assert (
        masks(tmp / "out", data, v, "2") == masks(tmp / "out", data, v, "3")
    ).all()  # 2 and 3 are still a pair


def test_a_lone_first_sentence(copy):
    "Pairs mix the objects; the guard and the matching do not."
    tmp, data = copy
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    for v in listing["videos"].values():
        del v["expressions"]["0"]
    write_json(path, listing)
    cut = open_dataset(tmp / "data")
    right = {}
    for name, options in {
        "pairs": {},
        "guarded": {"guard": 0.3},
        "matched": {"groups": "matched"},
        "objects": {"groups": "objects"},
    }.items():
        fuse(tmp / "data", [tmp / "m0", tmp / "m0"], tmp / name, **options).check()
        right[name] = sum(
            (masks(tmp / name, cut, e.video, e.id) == data.masks(e)).all() for e in cut
        )
    assert right["guarded"] == right["matched"] == right["objects"] == len(cut) > right["pairs"]


def test_mevis_is_not_pooled_and_knows_nobody_and_several(tmp_path):
    refshapes.write(
        tmp_path / "data",
        "valid_u",
        "easy",
        videos=2,
        seed=1,
        frames=3,
        size=(64, 96),
        layout="mevis",
    )
    data = open_dataset(tmp_path / "data", "valid_u")

    def half(side):  # each finds one half of the objects that a sentence means
        def draw(e):
            full = data.masks(e)
            if e.kind != "several":
                return full if e.kind != "none" else np.indices(full.shape)[2] < 20
            meant = e.object_id.split("+")
            objects = {
                x.object_id: data.masks(x)
                for x in data.expressions[e.video]
                if x.object_id in meant
            }
            objects = [objects[id] for id in meant]
            return np.logical_or.reduce([o for k, o in enumerate(objects) if k % 2 == side])

        return draw

    def level(e):
        return np.full(3, 0.1 if e.kind == "none" else 0.8)

    members = [soft_member(tmp_path / f"m{i}", data, half(i), level) for i in range(2)]
    with pytest.raises(Problem, match="MeViS"):
        fuse(tmp_path / "data", members, tmp_path / "out", split="valid_u")
    fuse(
        tmp_path / "data",
        members,
        tmp_path / "out",
        split="valid_u",
        groups="none",
        confidence=True,
        absent=0.3,
        union=0.4,
    ).check()
    fuse(tmp_path / "data", members, tmp_path / "plain", split="valid_u", groups="none").check()
    for e in data:
        assert (masks(tmp_path / "out", data, e.video, e.id) == data.masks(e)).all(), e
    wrong = {
        e.kind
        for e in data
        if not (masks(tmp_path / "plain", data, e.video, e.id) == data.masks(e)).all()
    }
    assert wrong == {"several", "none"}


def test_confidence_needs_a_member_with_scores(copy):
    tmp, _ = copy
    for i, options in enumerate(({"confidence": True}, {"key_frames": "pooled"})):
        report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / f"out{i}", **options)
        assert (
            len(report.failed) == 3
            and all("keeps scores" in why for why in report.failed.values())
            and not (tmp / f"out{i}/key_frame.json").exists()
        )


def test_key_frames(copy):
    """Of a member by its name, of the pooled scores,
    and of the best frame in which the fused mask has a pixel; a resumed run chooses the same."""
    tmp, data = copy
    gone = next(iter(data))

    def draw(e):
        x = data.masks(e).copy()
        x[2] &= e is not gone and e.id != gone.id
        return x

    soft = soft_member(tmp / "soft", data, draw, lambda e: np.array([0.2, 0.5, 0.6]))

    def keys(**options):
        out = tmp / ("k" + "_".join(map(str, options.values())))
        fuse(
            tmp / "data",
            [soft, tmp / "m0"],
            out,
            leftover="first",
            groups="none",
            threshold=2,
            **options,
        ).check()
        text = (out / "key_frame.json").read_text()
        (out / "key_frame.json").unlink()
        fuse(
            tmp / "data",
            [soft, tmp / "m0"],
            out,
            leftover="first",
            groups="none",
            threshold=2,
            **options,
        ).check()
        assert (out / "key_frame.json").read_text() == text
        return from_json(json.loads(text))

    assert (
        keys(key_frame_member="m0")
        == keys(key_frame_member=1)
        == from_json(read_json(tmp / "m0/key_frame.json"))
    )
    assert {k for es in keys(key_frames="pooled").values() for k in es.values()} == {2}
    assert all(
        k == (1 if e == gone.id else 2)
        for es in keys(key_frames="nonempty").values()
        for e, k in es.items()
    )


def test_objects_need_ids(copy):
    tmp, _ = copy
    path = tmp / "data/meta_expressions/valid/meta_expressions.json"
    listing = read_json(path)
    for v in listing["videos"].values():
        for e in v["expressions"].values():
            e.pop("obj_id", None)
    write_json(path, listing)
    report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "out", groups="objects")
    assert len(report.failed) == 3 and all("no object id" in why for why in report.failed.values())


SLOW = """
import sys, time
from pathlib import Path
import rvos_nb.fuse as f
write = f._write_group
def slowly(*a): time.sleep(.05); write(*a); print('.', flush=True)
f._write_group = slowly
tmp = Path(sys.argv[1]); f.fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'killed'/'out')
"""


def test_killed_and_run_again(copy):
    tmp, data = copy
    fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "whole" / "out").check()
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, tmp], stdout=subprocess.PIPE, env=dict(os.environ, IN_TEST="1")
    )
    for _ in range(len(group_expressions(data.expressions[next(iter(data.videos))])) + 2):
        child.stdout.readline()  # into the second video
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (
        list((tmp / "killed" / "out").rglob(".tmp-*"))
        and not (tmp / "killed/out/key_frame.json").exists()
    )
    report = fuse(tmp / "data", [tmp / "m0", tmp / "m1"], tmp / "killed" / "out").check()
    assert report.skipped and report.done and files(tmp / "killed") == files(tmp / "whole")


def test_no_torch():
    names = ("fuse", "metrics", "evaluate", "explore", "keyframe", "verify.pipeline")
    imports = "\n".join(f"import rvos_nb.{name}" for name in names)
    code = f"import sys\n{imports}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
