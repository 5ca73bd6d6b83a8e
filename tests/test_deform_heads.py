"""Parity of deformable attention and of the dynamic mask head with the published ones,
their bad inputs, and how kernels are built."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from rvos_nb.core import Problem
from rvos_nb.models.attention import Attention
from rvos_nb.models.deformable import DeformableTransformer
from rvos_nb.models.fusion import CrossFusion
from rvos_nb.models.heads import (
    MLP,
    aligned_bilinear,
    dynamic_mask_head,
    dynamic_size,
    pixel_centres,
)
from rvos_nb.models.pixel_decoder import CrossModalFPN
from rvos_nb.ops import native
from rvos_nb.ops.deform_attn import (
    MSDeformAttn,
    choose_implementation,
    ms_deform_attn,
    read_points,
    sampling_points,
    use_implementation,
    why_unavailable,
)

WAYS = [
    w for w in ("cpp", "pytorch") if not why_unavailable(w, torch.device("cpu"), torch.float32)
]  # the Triton and CUDA ways: test_deform_gpu.py


@pytest.fixture(params=WAYS)
def way(request):
    "Each implementation that a CPU can run, in turn."
    with use_implementation(request.param):
        yield request.param


needs_compiler = pytest.mark.skipif(
    not native.find_compiler(Path("x.cpp")), reason="no C++ compiler"
)
GOLDEN = Path(__file__).parent / "golden" / "referformer"


def fill(name, shape):
    noise = (
        np.random.RandomState(zlib.crc32(name.encode()))
        .standard_normal(size=tuple(shape))
        .astype(np.float32)
    )
    if len(shape) >= 2:
        return noise / np.float32(np.sqrt(prod(shape[1:])))
    return 1 + np.float32(0.1) * noise if name.endswith("weight") else np.float32(0.1) * noise


def image(seed, shape):
    return torch.from_numpy(
        np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32)
    )


def case(name):
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return json.loads(str(arrays["meta"])), {
        k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "meta"
    }


def agree(found, expected, stride=None):
    found = found.detach()
    if stride:
        found = found[tuple(slice(None, None, s) for s in stride)]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_core_matches_published_values_and_gradients(way):
    _, a = case("deform_attn")
    shapes = [tuple(s) for s in a["in/core/spatial_shapes"].tolist()]
    inputs = [
        a[f"in/core/{k}"].requires_grad_()
        for k in ("value", "sampling_locations", "attention_weights")
    ]
    out = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    agree(out, a["out/core/output"])
    out.backward(a["in/core/grad_output"])
    for x, name in zip(inputs, ("value", "sampling_locations", "attention_weights")):
        agree(x.grad, a[f"out/core/grad_{name}"])


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_module_matches_published_values_and_gradients(kind, way):
    meta, a = case("deform_attn")
    module = MSDeformAttn()
    module.load_state_dict({k: torch.from_numpy(fill(k, shape)) for k, shape, _ in meta["keys"]})
    shapes = [tuple(s) for s in a["in/module/spatial_shapes"].tolist()]
    query, value, grad = (
        image(26, (2, 9, 256)).requires_grad_(),
        image(27, (2, 65, 256)).requires_grad_(),
        image(28, (2, 9, 256)),
    )
    reference = a[f"in/module/reference_{kind}"]
    out = module(query, reference, value, shapes, a["in/module/padding_mask"])
    out.backward(grad)
    locations, weights = module.sample(query, reference, shapes)
    found = {
        "output": out,
        "sampling_locations": locations,
        "attention_weights": weights,
        "grad_query": query.grad,
        "grad_input": value.grad,
        "grad_sampling_offsets_weight": module.sampling_offsets.weight.grad,
        "grad_attention_weights_weight": module.attention_weights.weight.grad,
        "grad_value_proj_weight": module.value_proj.weight.grad,
        "grad_output_proj_bias": module.output_proj.bias.grad,
    }
    for name, x in found.items():
        agree(x, a[f"out/module/{kind}/{name}"], meta["outputs"][f"module/{kind}/{name}"]["stride"])


def test_dynamic_mask_head_matches_published():
    _, a = case("dynamic_mask_head")
    features = image(41, (2, 2, 256, 9, 12))
    for name, n, reference in (
        ("rel_coord", 2153, a["in/reference_points"].view(2, 2, 3, 2)),
        ("no_rel_coord", 2137, None),
    ):
        params = 0.1 * image(42, (2, 6, n)).view(2, 2, 3, n)
        agree(
            dynamic_mask_head(features, params, reference, a["in/sizes"]).view(2, 6, 9, 12),
            a[f"out/{name}"],
        )
        assert dynamic_size(relative=reference is not None) == n
    for factor in (2, 4):
        agree(
            aligned_bilinear(image(44, (2, 3, 5, 7)), factor), a[f"out/aligned_bilinear_{factor}"]
        )
    x, y = pixel_centres(3, 4)
    agree(
        torch.stack([x.expand(3, 4), y[:, None].expand(3, 4)], -1).reshape(12, 2),
        a["out/locations"],
    )


def slow_reading(value, shapes, locations, weights):
    """One query at a time, four neighbours at a time: (Lq, heads*dim) of batch item 0."""
    out, start = torch.zeros(locations.shape[1], *value.shape[2:]), 0
    for level, (h, w) in enumerate(shapes):
        cells = value[0, start : start + h * w].view(h, w, *value.shape[2:])
        start += h * w
        for index in np.ndindex(locations.shape[1], value.shape[2], locations.shape[4]):
            q, m, k = index
            x, y = (locations[0, q, m, level, k].double() * torch.tensor([w, h]) - 0.5).tolist()
            for i in (int(np.floor(y)), int(np.floor(y)) + 1):
                for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= i < h and 0 <= j < w:
                        out[q, m] += (
                            weights[0, q, m, level, k]
                            * (1 - abs(x - j))
                            * (1 - abs(y - i))
                            * cells[i, j, m]
                        )
    return out.flatten(1)


@pytest.mark.parametrize("seed", range(8))
def test_core_agrees_with_the_formula_on_random_shapes(seed, way):
    g = torch.Generator().manual_seed(seed)
    heads, dim, levels, points, queries = (
        int(torch.randint(1, n, (1,), generator=g)) for n in (4, 5, 4, 4, 4)
    )
    shapes = [tuple(torch.randint(1, 6, (2,), generator=g).tolist()) for _ in range(levels)]
    value = torch.randn(1, sum(h * w for h, w in shapes), heads, dim, generator=g)
    locations = (
        torch.rand(1, queries, heads, levels, points, 2, generator=g) * 3 - 1
    )  # many outside
    weights = torch.rand(1, queries, heads, levels, points, generator=g)
    torch.testing.assert_close(
        ms_deform_attn(value, shapes, locations, weights)[0],
        slow_reading(value, shapes, locations, weights),
        atol=1e-4,
        rtol=1e-4,
    )


def off_lines(locations, shapes):
    "Places away from the lines through cell centres, where the gradient jumps."
    sizes = torch.tensor([(w, h) for h, w in shapes]).to(locations)[:, None]
    at = locations * sizes - 0.5
    return (at.floor() + (at - at.floor()).clamp(0.05, 0.95) + 0.5) / sizes


def sample_inputs(seed, dtype=torch.float32, n=None, queries=None, softmax=False, reference=""):
    """Random sizes, sometimes none at all of something;
    places in and around the maps; a reference of points or boxes."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    n, queries = pick(0, 4) if n is None else n, pick(0, 8) if queries is None else queries
    heads, dim, points, shapes = (
        pick(1, 5),
        (1, 3, 8, 16, 20, 32)[pick(0, 6)],
        pick(1, 5),
        [(pick(1, 7), pick(1, 7)) for _ in range(pick(1, 5))],
    )

    def normal(*size):
        return torch.randn(size, generator=g, dtype=exact)

    value, weights = (
        normal(n, sum(h * w for h, w in shapes), heads, dim).to(dtype),
        normal(n, queries, heads, len(shapes), points).to(dtype),
    )
    locations = off_lines(
        torch.rand(n, queries, heads, len(shapes), points, 2, generator=g, dtype=exact) * 2 - 0.5,
        shapes,
    )
    around = None
    if reference:
        around = 0.3 + 0.4 * torch.rand(
            pick(0, 2) * (n - 1) + 1,
            queries,
            pick(0, 2) * (len(shapes) - 1) + 1,
            2 if reference == "points" else 4,
            generator=g,
            dtype=exact,
        )
    if reference:
        locations = normal(*locations.shape)
    return [value, shapes, locations, weights, around, softmax]


def by_the_formula(value, shapes, locations, weights, reference=None, softmax=False):
    """In float64, differentiable, with gathers instead of `grid_sample`:
    every place and every cell of its level."""
    value, locations, weights, reference = (
        x if x is None else x.double() for x in (value, locations, weights, reference)
    )
    if reference is not None:
        locations = sampling_points(reference, locations, shapes)
    if softmax:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    out = 0
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        h, w = shapes[level]

        def near(at, size):
            return (1 - (at[..., None] * size - 0.5 - torch.arange(size)).abs()).clamp(
                min=0
            )  # (N, Lq, heads, points, size): the tent around each cell

        x, y = locations[:, :, :, level].unbind(-1)
        share = (near(y, h)[..., None] * near(x, w)[..., None, :]).flatten(4)
        out = out + torch.einsum("nqmp,nqmpc,ncmd->nqmd", weights[:, :, :, level], share, part)
    return out.flatten(2)


@pytest.mark.parametrize(
    "dtype, allowed",
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 2e-3),
        (torch.bfloat16, 1.5e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(12))
def test_values_and_gradients_on_random_sizes(seed, dtype, allowed, way):
    inputs = sample_inputs(
        seed, dtype, softmax=seed % 2 == 1, reference=("", "points", "boxes")[seed % 3]
    )
    ours = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    exact = [x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    out, truth = ms_deform_attn(*ours), by_the_formula(*exact)
    grad = torch.randn(
        truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
    assert out.dtype == dtype and out.shape == truth.shape
    out.backward(grad)
    truth.backward(grad.double())
    pairs = [
        (out, truth),
        *((a.grad, b.grad) for a, b in zip(ours, exact) if isinstance(a, torch.Tensor)),
    ]
    for found, expected in pairs:
        assert (
            found.dtype in (dtype, torch.float32)
            and (found.double() - expected).norm() <= allowed * expected.norm() + 1e-30
        )


@pytest.mark.parametrize("softmax, reference", [(False, ""), (True, "points"), (True, "boxes")])
def test_core_gradients_numerically(softmax, reference, way):
    inputs = sample_inputs(3, torch.float64, n=2, queries=3, reference=reference)
    value, shapes, locations, weights, around, _ = [
        x[..., :2] if i == 0 else x for i, x in enumerate(inputs)
    ]
    given = [
        x.requires_grad_()
        for x in (value.contiguous(), locations, weights, *([around] if reference else []))
    ]
    assert torch.autograd.gradcheck(
        lambda v, at, w, r=None: ms_deform_attn(v, shapes, at, w, r, softmax), given
    )


def test_places_at_borders_and_on_levels_of_one_cell(way):
    """One cell of value 1: full weight at its centre,
    half a cell's side away half of it, nothing from one side on; corners are products."""
    at = torch.tensor(
        [
            [0.5, 0.5],
            [1.0, 0.5],
            [1.4999, 0.5],
            [1.5, 0.5],
            [-0.5, 0.5],
            [0.0, 0.0],
            [2.0, 0.5],
            [-1e30, 0.5],
            [1e30, 1e30],
        ]
    )
    out = ms_deform_attn(
        torch.ones(1, 1, 1, 1), [(1, 1)], at.view(1, 9, 1, 1, 1, 2), torch.ones(1, 9, 1, 1, 1)
    ).flatten()
    torch.testing.assert_close(
        out, torch.tensor([1, 0.5, 0.0001, 0, 0, 0.25, 0, 0, 0]), atol=1e-5, rtol=0
    )
    row = ms_deform_attn(
        torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1),
        [(1, 3)],
        torch.tensor([[i / 6, 0.5] for i in range(7)]).view(1, 7, 1, 1, 1, 2),
        torch.ones(1, 7, 1, 1, 1),
    ).flatten()
    torch.testing.assert_close(row, torch.tensor([0.5, 1, 1.5, 2, 3, 4, 2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_place_that_is_no_number_is_outside(bad, softmax, way):
    value, shapes, locations, weights, *_ = sample_inputs(5, n=2, queries=4)
    locations, away = locations.clone(), locations.clone()
    for i, (axes, new) in enumerate((((0,), bad), ((1,), bad), ((0, 1), bad))):
        for axis in axes:
            locations[:, i, :, 0, 0, axis] = new
        away[:, i, :, 0, 0] = 50.0
    answers = []
    for at in (locations, away):
        given = [x.clone().requires_grad_() for x in (value, at, weights)]
        out = ms_deform_attn(given[0], shapes, *given[1:], softmax=softmax)
        answers.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for a, b in zip(*answers):
        assert a.isfinite().all() and torch.equal(a, b)
    assert (answers[0][2][:, :3, :, 0, 0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["offset", "reference"])
@pytest.mark.parametrize("numbers", [2, 4])
def test_what_a_broken_place_was_made_from_has_finite_gradients(way, numbers, where, bad):
    rng = torch.Generator().manual_seed(0)
    value, offsets, logits, reference = (
        torch.rand(*s, generator=rng)
        for s in ((2, 26, 2, 4), (2, 7, 2, 2, 3, 2), (2, 7, 2, 2, 3), (1, 7, 1, numbers))
    )
    if where == "offset":
        offsets[0, 2, 1, 0, 1, 0] = bad
    else:
        reference[0, 2, 0, -1] = bad
    given = [x.requires_grad_() for x in (value, offsets, logits, reference)]
    out = ms_deform_attn(value, [(4, 5), (2, 3)], offsets, logits, reference, softmax=True)
    gradients = torch.autograd.grad(out.sum(), given)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert (
        not (gradients[1][0, 2, 1, 0, 1] if where == "offset" else gradients[1][:, 2]).any()
        and gradients[3][0, 3].any()
    )


def test_fake_tensors_leave_nothing_behind():
    "A model looked through with fake tensors works on real ones afterwards."
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = MSDeformAttn(32, 2, 4, 3)
    given = torch.zeros(2, 7, 32), torch.zeros(2, 7, 1, 2), [(9, 5), (2, 3)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.sample(*given)
    assert type(module.sample(*given)[0]) is torch.Tensor


def test_gradients_of_points_outside_are_written(way):
    """A known fast kernel leaves memory as it was for a point outside,
    and the softmax's gradient then reads it."""
    value, shapes, locations, logits, *_ = sample_inputs(7, n=3, queries=5)
    outside = torch.rand(locations.shape[:-1], generator=torch.Generator().manual_seed(0)) < 0.6
    locations[outside] = 40.0
    litter = [
        torch.full_like(x, 1e30) for x in (value, locations, logits)
    ]  # what the allocator hands out next
    del litter
    ours, exact = (
        [x.clone().to(t).requires_grad_() for x in (value, locations, logits)]
        for t in (torch.float32, torch.float64)
    )
    out, truth = (
        ms_deform_attn(ours[0], shapes, *ours[1:], softmax=True),
        by_the_formula(exact[0], shapes, *exact[1:], softmax=True),
    )
    out.square().sum().backward()
    truth.square().sum().backward()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad, b.grad.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("n, queries", [(37, 1), (37, 5), (5, 700)])
def test_each_image_reads_its_own(n, queries, way):
    "A known fast kernel finds the image once for a block of queries, and blocks span images."
    value, shapes, locations, weights, *_ = sample_inputs(11, n=n, queries=queries)
    value = torch.arange(1.0, n + 1)[:, None, None, None].expand_as(value)
    locations = locations.clamp(0.5 / 6, 0.5) * 0 + 0.5
    found = ms_deform_attn(
        value, shapes, locations, torch.full_like(weights, 1 / weights[0, 0, 0].numel())
    )
    torch.testing.assert_close(found, torch.arange(1.0, n + 1)[:, None, None].expand_as(found))


def test_queries_and_values_need_not_be_contiguous(way):
    value, shapes, locations, weights, around, _ = sample_inputs(
        3, n=3, queries=6, reference="boxes"
    )
    expected = ms_deform_attn(value, shapes, locations, weights, around, True)
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, locations, weights)]
    assert not strange[1].is_contiguous()
    assert torch.equal(ms_deform_attn(strange[0], shapes, *strange[1:], around, True), expected)
    every_second = [
        torch.cat([x, torch.zeros_like(x)], 1)
        .unflatten(1, (2, -1))
        .transpose(1, 2)
        .flatten(1, 2)[:, ::2]
        for x in (locations, weights)
    ]
    assert torch.equal(ms_deform_attn(value, shapes, *every_second, around, True), expected)
    v = value.clone().requires_grad_()
    ms_deform_attn(v, shapes, locations, weights, around, True).backward(
        torch.ones(()).expand_as(expected)
    )  # a gradient without memory of its own


def test_nothing_to_read_or_to_ask(way):
    for n, queries, points in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        given = [
            torch.ones(n, 6, 2, 4),
            torch.rand(n, queries, 2, 1, points, 2),
            torch.rand(n, queries, 2, 1, points),
        ]
        given = [x.requires_grad_() for x in given]
        out = ms_deform_attn(given[0], [(2, 3)], *given[1:])
        out.sum().backward()
        assert (
            out.shape == (n, queries, 8)
            and not out.any()
            and all(x.grad.shape == x.shape and not x.grad.any() for x in given)
        )


def test_the_same_bits_on_every_run_and_with_any_number_of_threads(way):
    value, shapes, locations, weights, *_ = sample_inputs(14, n=3, queries=900)

    def answers(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            given = [x.clone().requires_grad_() for x in (value, locations, weights)]
            out = ms_deform_attn(given[0], shapes, *given[1:])
            return [out, *torch.autograd.grad(out.square().sum(), given)]
        finally:
            torch.set_num_threads(before)

    first = answers(1)
    for threads in (1, 2, 5) if way == "cpp" else (1, 1):
        assert all(torch.equal(a, b) for a, b in zip(first, answers(threads)))


def test_the_operator_keeps_pytorchs_rules(way):
    value, shapes, locations, weights, around, _ = sample_inputs(
        3, n=2, queries=3, reference="points"
    )
    flat, op = [x for s in shapes for x in s], torch.ops.rvos_nb.ms_deform_attn.default
    for requires in (False, True):
        given = [x.clone().requires_grad_(requires) for x in (value, locations, weights, around)]
        torch.library.opcheck(op, (given[0], flat, given[1], given[2], given[3], True, ""))
        torch.library.opcheck(op, (given[0], flat, given[1], given[2], None, False, ""))
    grad = torch.randn(2, 3, value.shape[2] * value.shape[3])
    torch.library.opcheck(
        torch.ops.rvos_nb.ms_deform_attn_backward.default,
        (grad, value, flat, locations, weights, around, True, "", True),
    )
    torch.library.opcheck(
        torch.ops.rvos_nb.ms_deform_attn_backward.default,
        (grad, value, flat, locations, weights, None, False, "", False),
    )


def test_compiles_into_one_graph(recwarn):
    torch.manual_seed(0)
    module = MSDeformAttn(16, 2, 2, 3)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    shapes, query, value, at = (
        [(4, 6), (2, 3)],
        torch.randn(2, 5, 16),
        torch.randn(2, 30, 16),
        torch.rand(1, 5, 2, 2),
    )
    padding = torch.zeros(2, 30, dtype=torch.bool)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: module(*x[:3], shapes, padding), fullgraph=True, backend="aot_eager"
    )
    for n in (2, 3):  # the second time with another batch
        inputs = [
            query.repeat(2, 1, 1)[:n].clone().requires_grad_(),
            at,
            value.repeat(2, 1, 1)[:n].clone(),
        ]
        padding = torch.zeros(n, 30, dtype=torch.bool)
        whole, plain = compiled(*inputs), module(*inputs, shapes, padding)
        torch.testing.assert_close(whole, plain)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.sum(), inputs[0])[0] for y in (whole, plain))
        )
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_second_derivatives_are_refused_clearly():
    value, shapes, locations, weights, *_ = sample_inputs(3, n=1, queries=2)
    value.requires_grad_()
    weights.requires_grad_()
    (grad,) = torch.autograd.grad(
        ms_deform_attn(value, shapes, locations, weights).square().sum(), value, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"no second derivatives.*read_points"):
        grad.sum().backward()


def test_autocast_narrows_values_but_never_places(way):
    value, shapes, locations, weights, around, _ = sample_inputs(
        15, n=2, queries=5, reference="points"
    )
    exact = by_the_formula(value.bfloat16(), shapes, locations, weights.bfloat16(), around, True)
    v = value.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ms_deform_attn(v, shapes, locations, weights, around, True)
        assert (
            ms_deform_attn(value.double(), shapes, locations.double(), weights.double()).dtype
            == torch.float64
        )
    assert (
        out.dtype == torch.bfloat16 and ((out.double() - exact).norm() / exact.norm()).item() < 4e-3
    )  # bfloat16 places give several percent
    out.sum().backward()
    assert v.grad.dtype == torch.float32 and v.grad.any()
    module = MSDeformAttn(16, 1, 2, 2).bfloat16()
    assert (
        module(
            torch.randn(1, 3, 16).bfloat16(),
            torch.rand(1, 3, 1, 2),
            torch.randn(1, 12, 16).bfloat16(),
            [(3, 4)],
        ).dtype
        == torch.bfloat16
    )


def test_more_frames_than_the_published_kernel_takes(way):
    torch.manual_seed(0)
    value, locations, weights = (
        torch.randn(67, 12, 1, 2),
        torch.rand(67, 3, 1, 1, 2, 2),
        torch.rand(67, 3, 1, 1, 2),
    )
    whole = ms_deform_attn(value, [(3, 4)], locations, weights)
    torch.testing.assert_close(
        whole[66:], ms_deform_attn(value[66:], [(3, 4)], locations[66:], weights[66:])
    )


def test_inference_mode_first_does_not_break_training(way):
    module, shapes = MSDeformAttn(8, 1, 2, 1), [(3, 7)]
    query, value, at = torch.randn(1, 2, 8), torch.randn(1, 21, 8), torch.rand(1, 2, 1, 2)
    with torch.inference_mode():
        module(query, at, value, shapes)
    module(query, at, value, shapes).sum().backward()
    assert module.sampling_offsets.weight.grad is not None


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="expected 12 cells"):
        ms_deform_attn(
            torch.zeros(1, 11, 1, 2),
            [(3, 4)],
            torch.zeros(1, 1, 1, 1, 1, 2),
            torch.zeros(1, 1, 1, 1, 1),
        )
    with pytest.raises(ValueError, match="expected 1 levels"):
        ms_deform_attn(
            torch.zeros(1, 12, 1, 2),
            [(3, 4)],
            torch.zeros(1, 1, 1, 2, 1, 2),
            torch.zeros(1, 1, 1, 2, 1),
        )
    value, at, weights = (
        torch.zeros(2, 12, 1, 2),
        torch.zeros(2, 4, 1, 1, 3, 2),
        torch.zeros(2, 4, 1, 1, 3),
    )
    for match, broken in (
        ("weights: expected", [value, [(3, 4)], at, weights[:, :3]]),
        ("locations: expected", [value, [(3, 4)], at[:1], weights]),
        ("locations: expected", [value, [(3, 4)], at[..., :1], weights]),
        ("one cell or more", [value, [(3, 4), (0, 2)], at.expand(-1, -1, -1, 2, -1, -1), weights]),
        ("one cell or more", [value, [(-3, -4)], at, weights]),
        ("reference: expected", [value, [(3, 4)], at, weights, torch.zeros(2, 3, 1, 2)]),
        ("reference: expected", [value, [(3, 4)], at, weights, torch.zeros(2, 4, 1, 3)]),
        ("floating type", [value.int(), [(3, 4)], at, weights]),
    ):
        with pytest.raises(ValueError, match=match):
            ms_deform_attn(*broken)
        with pytest.raises(ValueError, match=match):
            ms_deform_attn(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in broken))
    for grad in (torch.zeros(2, 4, 3), torch.zeros(2, 4, 2).double()):
        with pytest.raises(ValueError, match="grad: expected"):
            torch.ops.rvos_nb.ms_deform_attn_backward(
                grad, value, [3, 4], at, weights, None, False, "", False
            )
    for broken in (lambda: MSDeformAttn(10, heads=4), lambda: Attention(10, 4)):
        with pytest.raises(ValueError, match="divisor of 10"):
            broken()
    with pytest.raises(ValueError, match="expected 113 numbers"):
        dynamic_mask_head(
            torch.zeros(1, 1, 1, 2, 2),
            torch.zeros(1, 1, 1, 99),
            torch.zeros(1, 1, 1, 2),
            torch.ones(1, 2),
        )
    with pytest.raises(ValueError, match="expected 4 maps"):
        CrossModalFPN(8, 8, 8, 2, 8)(
            [torch.zeros(1, 8, 8, 8)], [], None, torch.zeros(1, 2, 8), None, torch.zeros(1, 2, 8), 1
        )
    with pytest.raises(ValueError, match="expected 2 maps"):
        DeformableTransformer(8, 2, (1, 1), 8, levels=2)(
            [torch.zeros(1, 8, 4, 4)], [], None, torch.zeros(2, 8), torch.zeros(1, 2, 8)
        )


def test_published_names_and_sizes():
    transformer, fpn, fusion = DeformableTransformer(), CrossModalFPN(), CrossFusion()
    transformer.decoder.bbox_embed = torch.nn.ModuleList(MLP(256, 256, 4) for _ in range(4))
    shapes = {
        k: tuple(v.shape) for m in (transformer, fpn, fusion) for k, v in m.state_dict().items()
    }
    expected = {
        "level_embed": (4, 256),
        "reference_points.weight": (2, 256),
        "decoder.bbox_embed.3.layers.2.weight": (4, 256),
        "encoder.layers.3.self_attn.sampling_offsets.weight": (256, 256),
        "encoder.layers.0.linear1.weight": (2048, 256),
        "decoder.layers.0.cross_attn.attention_weights.bias": (128,),
        "decoder.layers.3.self_attn.in_proj_weight": (768, 256),
        "decoder.layers.1.norm3.bias": (256,),
        "adapter_1.weight": (256, 256, 1, 1),
        "layer_4.norm.weight": (256,),
        "cross_attn_2.multihead_attn.out_proj.bias": (256,),
        "cross_attn_1.self_attn.in_proj_bias": (768,),
        "mask_features.weight": (256, 256, 3, 3),
        "multihead_attn.in_proj_weight": (768, 256),
    }
    assert {k: shapes.get(k) for k in expected} == expected
    assert MLP(256, 256, dynamic_size()).layers[2].weight.shape == (2153, 256)


@pytest.mark.parametrize("seed", range(4))
def test_sentences_of_one_video_agree_with_copies_of_it(seed):
    g = torch.Generator().manual_seed(seed)
    frames, sentences, length = (int(torch.randint(1, 4, (1,), generator=g)) for _ in range(3))
    h, w = (int(torch.randint(1, 20, (1,), generator=g)) for _ in range(2))
    sizes = [(-(-h // s), -(-w // s)) for s in (1, 2, 4, 8)]
    torch.manual_seed(seed)
    fpn = CrossModalFPN(8, 16, 16, 2, 16, groups=4).eval()
    levels = [torch.randn(frames, 8, *sizes[0])] + [
        torch.randn(sentences * frames, 16, *s) for s in sizes[1:]
    ]
    positions, masks = (
        [torch.randn(1, 16, *s) for s in sizes],
        [torch.zeros(frames, *s, dtype=torch.bool) for s in sizes],
    )
    words, pos = torch.randn(sentences, length, 16), torch.randn(sentences, length, 16)
    word_mask = torch.arange(length).expand(sentences, -1) >= torch.randint(
        1, length + 1, (sentences, 1)
    )
    with torch.no_grad():
        shared = fpn(levels, positions, masks, words, word_mask, pos, frames)
        copies = fpn(
            [levels[0].repeat(sentences, 1, 1, 1), *levels[1:]],
            positions,
            None,
            words,
            word_mask,
            pos,
            frames,
        )
    torch.testing.assert_close(shared, copies, atol=1e-4, rtol=1e-4)
    assert shared.shape == (sentences * frames, 16, h, w)


# Which implementation, and how it is built


def test_an_implementation_can_be_asked_for(monkeypatch):
    for name in WAYS:
        monkeypatch.setenv("RVOS_DEFORM_ATTN", name)
        assert (
            choose_implementation("cpu")[0] == name
            and "asked for" in choose_implementation("cpu")[1]
        )
    with use_implementation("pytorch"):
        assert choose_implementation("cpu")[0] == "pytorch"
    value, shapes, locations, weights, *_ = sample_inputs(3, n=1, queries=2)
    for name in ("cuda", "numpy"):
        monkeypatch.setenv("RVOS_DEFORM_ATTN", name)
        with pytest.raises(Problem, match=name):
            ms_deform_attn(value, shapes, locations, weights)
    monkeypatch.delenv("RVOS_DEFORM_ATTN")
    assert (
        choose_implementation("cpu")[0] == WAYS[0] and choose_implementation("meta")[0] == "pytorch"
    )
    ms_deform_attn(value, shapes, locations, weights)


BUILD = """
import sys, warnings
warnings.simplefilter('always')
from rvos_nb.ops import native
try: print('answer', native.load_library(sys.argv[1]).answer())
except native.Unavailable as e: print('unavailable', e)
"""


def builder(source, cache, **env):
    "A process that loads `source`, with a cache folder of its own."
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "XDG_CACHE_HOME": str(cache),
            **{k: str(v) for k, v in env.items()},
        },
    )


def counting_compiler(folder, before=""):
    "A compiler that notes each build in `folder`/builds and then does it; CXX for `builder`."
    script = folder / "cxx"
    compiler = native.find_compiler(Path("x.cpp"))[0]
    script.write_text(
        f"""#!/bin/sh
        case "$*" in
          *-###*) ;;
          *-shared*) echo build >> {folder}/builds; {before} ;;
        esac
        exec {compiler} "$@"
        """
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def answer(tmp_path):
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    return source


@needs_compiler
def test_processes_that_start_together_build_once(tmp_path, answer):
    cxx = counting_compiler(tmp_path, "sleep 1")
    ends = [
        (p.communicate(timeout=120), p.returncode)
        for p in [builder(answer, tmp_path / "cache", CXX=cxx) for _ in range(3)]
    ]
    assert [e[0][0].strip() for e in ends] == ["answer 42"] * 3 and (
        tmp_path / "builds"
    ).read_text() == "build\n"
    assert sum("building" in e[0][1] for e in ends) == 1
    out, err = builder(answer, tmp_path / "cache", CXX=cxx).communicate(timeout=60)
    assert out.strip() == "answer 42" and not err and (tmp_path / "builds").read_text() == "build\n"
    answer.write_text(answer.read_text().replace("42", "43"))  # another source is another library
    assert (
        builder(answer, tmp_path / "cache", CXX=cxx).communicate(timeout=60)[0].strip()
        == "answer 43"
    )


@needs_compiler
def test_a_builder_that_is_killed_leaves_nothing_in_the_way(tmp_path, answer):
    cxx = counting_compiler(tmp_path, f"touch {tmp_path}/begun; sleep 30")
    first = builder(answer, tmp_path / "cache", CXX=cxx)
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    folder = tmp_path / "cache" / "rvos_nb" / "ops"
    (folder / ".tmp-0-half.so").write_text("half")
    assert not list(folder.glob("[!.]*"))
    out, err = builder(answer, tmp_path / "cache").communicate(timeout=60)
    assert out.strip() == "answer 42", err
    assert [p.suffix for p in folder.glob("[!.]*")] == [".so"] and not list(folder.glob(".tmp*"))


@needs_compiler
def test_a_failed_build_warns_once_and_is_not_tried_again(tmp_path, answer):
    answer.write_text('extern "C" int answer( { return 42; }')
    cxx = counting_compiler(tmp_path)
    out, err = builder(answer, tmp_path / "cache", CXX=cxx).communicate(timeout=60)
    assert (
        out.startswith("unavailable")
        and err.count("Warning") == 1
        and "error" in err
        and ".log" in err
    )
    out, err = builder(answer, tmp_path / "cache", CXX=cxx).communicate(timeout=60)
    assert (
        out.startswith("unavailable")
        and "did not compile" in out
        and not err
        and (tmp_path / "builds").read_text() == "build\n"
    )
    (log,) = (tmp_path / "cache" / "rvos_nb" / "ops").glob("*.log")
    assert "answer.cpp" in log.read_text()
    log.unlink()
    answer.write_text('extern "C" int answer() { return 42; }')
    assert (
        builder(answer, tmp_path / "cache", CXX=cxx).communicate(timeout=60)[0].strip()
        == "answer 42"
    )


def test_without_a_compiler_there_is_no_warning_but_a_reason(tmp_path, answer):
    out, err = builder(answer, tmp_path / "cache", CXX="no-such-compiler").communicate(timeout=60)
    assert out.startswith("unavailable no compiler for answer.cpp") and not err


@needs_compiler
def test_a_home_that_cannot_be_written_and_a_folder_open_to_all(tmp_path, answer, monkeypatch):
    """Without a cache folder the temporary directory takes its place;
    a folder that others may write is not trusted."""
    blocked = tmp_path / "file"
    blocked.touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    assert (
        builder(answer, blocked, TMPDIR=temporary).communicate(timeout=60)[0].strip() == "answer 42"
    )
    assert [p.suffix for p in (temporary / f"rvos_nb-{os.getuid()}" / "ops").glob("[!.]*")] == [
        ".so"
    ]
    (temporary / f"rvos_nb-{os.getuid()}" / "ops").chmod(0o777)
    out, err = builder(answer, blocked, TMPDIR=temporary).communicate(timeout=60)
    assert out.startswith("unavailable no folder to build in") and "Traceback" not in err


@needs_compiler
def test_a_library_built_ahead_is_found_without_a_compiler(tmp_path, answer):
    native.compile_library(answer, tmp_path / native.library_name(answer), "portable")
    out, err = builder(answer, tmp_path / "cache", CXX="no-such-compiler").communicate(timeout=60)
    assert out.strip() == "answer 42" and not err and not (tmp_path / "cache").exists()
    answer.write_text(answer.read_text() + " // changed since")
    assert (
        builder(answer, tmp_path / "cache", CXX="no-such-compiler")
        .communicate(timeout=60)[0]
        .startswith("unavailable")
    )


def test_a_library_that_fails_when_it_is_needed_gives_way_to_the_next(monkeypatch):
    value, shapes, locations, weights, *_ = sample_inputs(3, n=1, queries=2)

    def broken(source):
        raise native.Unavailable("it did not compile")

    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "_open_library", broken)
    monkeypatch.setattr(native, "library_state", lambda name: (True, "will be built"))
    torch.testing.assert_close(
        ms_deform_attn(value, shapes, locations, weights),
        read_points(value, shapes, locations, weights),
    )
    assert (
        choose_implementation("cpu")[0] == "pytorch"
        and "did not compile" in choose_implementation("cpu")[1]
    )
    if "cpp" in WAYS:
        with use_implementation("cpp"), pytest.raises(Problem, match="did not compile"):
            ms_deform_attn(value, shapes, locations, weights)


FORKED = """
import os, torch
from rvos_nb.ops.deform_attn import ms_deform_attn
torch.set_num_threads(3)
value, shapes = torch.randn(2, 1200, 8, 32), [(30, 40)]
locations, weights = torch.rand(2, 1200, 8, 1, 4, 2), torch.rand(2, 1200, 8, 1, 4)
before = ms_deform_attn(value, shapes, locations, weights)
if (pid := os.fork()) == 0:
    after = ms_deform_attn(value, shapes, locations, weights)
    os._exit(0 if torch.equal(after, before) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif("cpp" not in WAYS, reason="no C++ library")
def test_a_forked_process_works_too():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
