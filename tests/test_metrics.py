"""J, F, their statistics and the union of MeViS:
golden cases, the definitions written out, and input that does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from rvos_nb.bench.metrics import plain_f, plain_j
from rvos_nb.core import Problem
from rvos_nb.data.masks import rle_encode
from rvos_nb.metrics import boundary, contour_f, j_and_f, jaccard, sentence_scores, statistics
from rvos_nb.verify.cases import compare, load_case
from rvos_nb.verify.pipeline import jf_metrics, mevis_eval

GOLDEN = Path(__file__).parent / "golden/pipeline"


def test_golden():
    case = load_case(GOLDEN / "jf_metrics.npz")
    verdict = compare(case, jf_metrics(case.meta, case.arrays))
    assert verdict.ok and verdict.count == 298, verdict


def slow_f(gt, pred, r):
    "The definition, pixel by pixel: distances between all boundary pixels of the uncropped masks."
    h, w = gt.shape

    def edge(m):
        return [
            (y, x)
            for y in range(h)
            for x in range(w)
            if any(
                m[y, x] != m[b, a]
                for b, a in ((y, x + 1), (y + 1, x), (y + 1, x + 1))
                if b < h and a < w
            )
        ]

    g, p = edge(gt), edge(pred)
    if not g or not p:
        return float(not g and not p)

    def near(a, others):
        return any((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= r * r for b in others)

    precision, recall = np.mean([near(a, g) for a in p]), np.mean([near(a, p) for a in g])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(25))
def test_against_the_definitions(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 17, 2)

    def blob():
        return np.kron(rng.random((-(-h // 3), -(-w // 3))) < rng.random(), np.ones((3, 3), bool))[
            :h, :w
        ].astype(bool) ^ (rng.random((h, w)) < 0.03)

    gt, pred, void = blob(), blob(), blob()
    r = rng.choice([1, 2, 3, 4, 2.5, 3.3, 40])
    assert abs(contour_f(gt, pred, bound_th=r) - slow_f(gt, pred, r)) < 1e-12
    assert abs(contour_f(gt, pred, void, bound_th=r) - slow_f(gt & ~void, pred & ~void, r)) < 1e-12
    assert contour_f(gt, pred, bound_th=r) == contour_f(pred, gt, bound_th=r)
    union = ((gt | pred) & ~void).sum()
    assert jaccard(gt, pred, void) == ((gt & pred & ~void).sum() / union if union else 1)
    assert jaccard(np.stack([gt, pred]), np.stack([gt, gt]))[0] == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 90), (90, 2), (61, 47), (121, 213), (480, 854)])
def test_equal_to_the_plain_form_in_every_bit(size):
    rng = np.random.default_rng(size[1])

    def clip():
        h, w = size
        noise = np.stack(
            [
                np.kron(rng.random((-(-h // k), -(-w // k))) < share, np.ones((k, k), bool))[:h, :w]
                for k, share in ((1, 0.5), (1, 0.01), (4, 0.5), (9, 0.3), (5, 0), (5, 1))
            ]
        )
        for m in noise[:4:2]:
            m[:, : rng.integers(w)] = 0
            m[rng.integers(h) :] = 0  # leaves a box at the upper right
        return noise.astype(bool)

    gt, pred = clip(), clip()
    j, f = j_and_f(gt, pred)
    assert np.array_equal(j, plain_j(gt, pred)) and np.array_equal(f, plain_f(gt, pred))
    assert np.array_equal(j, jaccard(gt, pred)) and np.array_equal(f, contour_f(gt, pred))


def test_no_frames():
    assert [len(x) for x in j_and_f(np.zeros((0, 4, 5)), np.zeros((0, 4, 5)))] == [0, 0]


def test_mevis_union():
    rng = np.random.default_rng(3)
    objects = rng.random((3, 5, 33, 47)) < 0.3
    objects[1, 2:] = objects[:, 4] = False
    pred = rng.random((5, 33, 47)) < 0.5
    codes = [[rle_encode(m) if m.any() else None for m in o] for o in objects]
    assert sentence_scores(codes, pred) == tuple(x.mean() for x in j_and_f(objects.any(0), pred))
    assert sentence_scores([], pred[:1] & False) == (1, 1) and sentence_scores([], pred) == (
        0,
        contour_f(pred & False, pred).mean(),
    )
    assert sentence_scores(codes, None) == (0, 0)
    for wrong in (pred[:4], pred[:, :, 1:]):
        with pytest.raises(Problem):
            sentence_scores(codes, wrong)


def test_a_sentence_without_an_answer_stays_in_the_mean():
    case = load_case(GOLDEN / "mevis_eval.npz")
    whole = dict(mevis_eval(case.meta, case.arrays))
    part = dict(mevis_eval(case.meta, {k: a for k, a in case.arrays.items() if k != "in/0ab4/0"}))
    before, after = (json.loads(str(x["per_expression"])) for x in (whole, part))
    assert after == before | {"0ab4_0": [0, 0]} and before["0ab4_0"] != [0, 0]
    assert np.isclose(part["J_F_JF"][0], whole["J_F_JF"][0] - before["0ab4_0"][0] / len(before))


def test_labels_and_greys_are_masks():
    gt = np.zeros((6, 8), np.uint8)
    gt[2:4, 2:6] = 3
    assert jaccard(gt, (gt > 0) * np.uint8(255)) == 1 == contour_f(gt, gt > 0)
    assert boundary((gt > 0).view(np.uint8)).sum() > 0


@pytest.mark.parametrize(
    "a, b", [((4, 5), (4, 6)), ((2, 4, 5), (4, 5)), ((2, 4, 5), (3, 4, 5)), ((4,), (4,))]
)
def test_shapes_that_do_not_fit(a, b):
    for metric in (jaccard, contour_f):
        with pytest.raises(Problem, match="shapes"):
            metric(np.zeros(a, bool), np.zeros(b, bool))


def test_statistics_of_long_and_odd_sequences():
    assert np.isclose(
        statistics(np.linspace(1, 0, 1000)).decay, 0.75, atol=1e-3
    )  # the published indices overflow here
    assert statistics([0.7]) == (0.7, 1.0, 0.0)
    assert np.isnan(statistics([np.nan, np.nan]).mean) and statistics([np.nan, np.nan]).recall == 0
    with pytest.raises(Problem, match="no value"):
        statistics([])
