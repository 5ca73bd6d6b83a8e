"J, F and their statistics: the golden case, the definitions written out, and input that does not fit."
from pathlib import Path
import numpy as np
import pytest
from rvos_nb.core import Problem
from rvos_nb.metrics import boundary, contour_f, jaccard, statistics
from rvos_nb.verify.cases import compare, load_case
from rvos_nb.verify.pipeline import jf_metrics

GOLDEN = Path(__file__).parent/'golden/pipeline'


def test_golden():
    case = load_case(GOLDEN/'jf_metrics.npz')
    verdict = compare(case, jf_metrics(case.meta, case.arrays))
    assert verdict.ok and verdict.count == 298, verdict


def slow_f(gt, pred, r):
    "The definition, pixel by pixel: distances between all boundary pixels of the uncropped masks."
    h, w = gt.shape
    def edge(m): return [(y, x) for y in range(h) for x in range(w) if any(
        m[y, x] != m[b, a] for b, a in ((y, x + 1), (y + 1, x), (y + 1, x + 1)) if b < h and a < w)]
    g, p = edge(gt), edge(pred)
    if not g or not p: return float(not g and not p)
    near = lambda a, others: any((a[0] - b[0])**2 + (a[1] - b[1])**2 <= r * r for b in others)
    precision, recall = np.mean([near(a, g) for a in p]), np.mean([near(a, p) for a in g])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize('seed', range(25))
def test_against_the_definitions(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 17, 2)
    blob = lambda: np.kron(rng.random((-(-h // 3), -(-w // 3))) < rng.random(), np.ones((3, 3), bool))[:h, :w].astype(bool) ^ (rng.random((h, w)) < .03)
    gt, pred, void = blob(), blob(), blob()
    r = int(rng.integers(1, 5))
    assert abs(contour_f(gt, pred, bound_th=r) - slow_f(gt, pred, r)) < 1e-12
    assert abs(contour_f(gt, pred, void, bound_th=r) - slow_f(gt & ~void, pred & ~void, r)) < 1e-12
    assert contour_f(gt, pred, bound_th=r) == contour_f(pred, gt, bound_th=r)
    union = ((gt | pred) & ~void).sum()
    assert jaccard(gt, pred, void) == ((gt & pred & ~void).sum() / union if union else 1)
    assert jaccard(np.stack([gt, pred]), np.stack([gt, gt]))[0] == 1


def test_labels_and_greys_are_masks():
    gt = np.zeros((6, 8), np.uint8); gt[2:4, 2:6] = 3
    assert jaccard(gt, (gt > 0) * np.uint8(255)) == 1 == contour_f(gt, gt > 0)
    assert boundary((gt > 0).view(np.uint8)).sum() > 0


@pytest.mark.parametrize('a, b', [((4, 5), (4, 6)), ((2, 4, 5), (4, 5)), ((2, 4, 5), (3, 4, 5)), ((4,), (4,))])
def test_shapes_that_do_not_fit(a, b):
    for metric in (jaccard, contour_f):
        with pytest.raises(Problem, match='shapes'): metric(np.zeros(a, bool), np.zeros(b, bool))


def test_statistics_of_long_and_odd_sequences():
    assert np.isclose(statistics(np.linspace(1, 0, 1000)).decay, 0.75, atol=1e-3)  # the published indices overflow here
    assert statistics([0.7]) == (0.7, 1.0, 0.0)
    assert np.isnan(statistics([np.nan, np.nan]).mean) and statistics([np.nan, np.nan]).recall == 0
    with pytest.raises(Problem, match='no value'): statistics([])
