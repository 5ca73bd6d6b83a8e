"Propagators: sizes, widths, half precision, memory, and checkpoints of both families."

from dataclasses import replace

import pytest
import torch

from rvos_nb.bench.propagate import PublishedWindow, make_published
from rvos_nb.core import Problem
from rvos_nb.models import zoo
from rvos_nb.vos import aot, deaot
from rvos_nb.vos.aot import AOT, group_norm
from rvos_nb.vos.attention import NearbySearch, attend, attend_wide
from rvos_nb.vos.deaot import DeAOT
from rvos_nb.vos.memory import AOTEngine, Memory, forward_sequence

FAMILIES = [(AOT, aot.AOT_VARIANTS["aot-tiny"]), (DeAOT, deaot.DEAOT_VARIANTS["deaot-tiny"])]
both = pytest.mark.parametrize("cls, config", FAMILIES, ids=["aot", "deaot"])


def walk(model, frames=4, size=(64, 96), objects=3, **policy):
    "Logits of every step of a clip of noise."
    torch.manual_seed(1)
    engine, labels = (
        AOTEngine(model, **policy),
        torch.arange(size[1]).mul(objects + 1).div(size[1], rounding_mode="floor").expand(size),
    )
    with torch.inference_mode():
        maps = [
            model.encode(torch.randn(1, 3, *size, dtype=next(model.parameters()).dtype))
            for _ in range(frames)
        ]
    engine.add_reference(maps[0], labels, objects)
    found = []
    for m in maps[1:]:
        engine.step(m)
        found.append(engine.logits(size))
        engine.commit(labels)
    return engine, torch.cat(found)


@pytest.mark.parametrize(
    "h, w, reach", [(1, 1, 7), (1, 40, 3), (40, 1, 3), (3, 5, 7), (13, 31, 2), (9, 23, 7)]
)
@pytest.mark.parametrize("heads, dim, wide", [(4, 16, 16), (1, 8, 24)])
def test_the_window_is_the_masked_product(h, w, reach, heads, dim, wide):
    torch.manual_seed(0)
    layer, q, k, v = (
        NearbySearch(dim, heads, reach),
        *torch.randn(2, 2, h * w, dim),
        torch.randn(2, h * w, wide),
    )
    offsets = torch.randn(heads, wide // heads, layer.side**2)
    with torch.no_grad():
        ours = layer.search(q, k, v, (h, w), offsets)
        layer.__class__ = PublishedWindow
        assert torch.allclose(ours, layer.search(q, k, v, (h, w), offsets), atol=1e-5)


def test_the_window_has_the_gradient_of_the_masked_product():
    torch.manual_seed(0)
    layer, qkv, found = (
        NearbySearch(8, 2, 2),
        [torch.randn(2, 35, 8, requires_grad=True) for _ in range(3)],
        [],
    )
    for form in (NearbySearch, PublishedWindow):
        layer.__class__ = form
        found.append(
            torch.autograd.grad(
                layer.search(*qkv, (5, 7)).square().sum(), [*qkv, layer.relative_emb_k.weight]
            )
        )
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    torch.manual_seed(0)
    q, k, v = (100 * torch.randn(1, 99, 16, dtype=dtype) for _ in range(3))
    layer = NearbySearch(16, 2, 3).to(dtype)
    with torch.no_grad():
        for y in (layer.search(q, k, v, (9, 11)), attend_wide(q, k, v), attend(q, k, v, 2)):
            assert y.dtype == dtype and y.isfinite().all()


@both
def test_a_model_in_half_precision(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    exact, (_, rough) = walk(model)[1], walk(model.bfloat16())
    assert rough.isfinite().all() and (rough.argmax(1) == exact.argmax(1)).float().mean() > 0.8


def test_group_norm_far_from_zero():
    torch.manual_seed(0)
    gn, x = torch.nn.GroupNorm(4, 32), torch.randn(2, 50, 32) + 100
    with torch.no_grad():
        assert torch.allclose(group_norm(x, gn).double(), gn.double()(x.double().mT).mT, atol=1e-4)


@both
def test_twelve_objects_are_twelve_objects(cls, config):
    "Two engines, of ten and of two, and an answer for each object."
    torch.manual_seed(0)
    engine, logits = walk(cls(replace(config, max_objects=10)).eval(), objects=12)
    assert logits.shape[1] == 13 and engine.used_identities == [10, 2] and logits.isfinite().all()
    assert all(len(m.long) == 1 for m in engine.memories)


@both
def test_a_new_object_opens_a_new_engine(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    engine, _ = walk(model, objects=5)
    with torch.inference_mode():
        maps = model.encode(torch.randn(1, 3, 64, 96))
    labels = torch.zeros(64, 96).long()
    labels[20:40, 20:40] = 6
    engine.add_reference(maps, labels, 6)
    engine.step(maps)
    assert engine.logits((64, 96)).shape[1] == 7 and [len(m.long) for m in engine.memories] == [
        2,
        1,
    ]


@both
@pytest.mark.parametrize("gap, limit", [(1, None), (1, 3), (2, 2), (1, 1)])
def test_memory_holds_what_it_says(cls, config, gap, limit):
    "The limit bounds the tensors, keeps the reference, and changes nothing before it is reached."
    torch.manual_seed(0)
    model = cls(config).eval()
    engine, logits = walk(model, frames=8, gap=gap, max_memory_frames=limit)
    memory, free = engine.memories[0], walk(model, frames=8, gap=gap)[1]
    kept = 1 + 7 // gap
    assert len(memory.long) == min(kept, limit or kept) and memory.long[-1].reference
    assert all(x.shape[1] == len(memory.long) * 8 * 12 for layer in memory.store for x in layer)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(logits, free)]
    before = 7 if limit is None or limit >= kept else gap * limit
    assert all(same[:before]) and (before == 7 or not all(same))


@both
def test_committing_twice_commits_the_same(cls, config):
    "What was seen is not changed by being remembered."
    torch.manual_seed(0)
    model = cls(config).eval()
    engine, _ = walk(model)
    seen, labels = engine.unlabelled[0], torch.ones(64, 96).long()
    before = [x.clone() for layer in seen for x in layer]
    engine.commit(labels)
    first = [x.clone() for layer in engine.memories[0].recent[0].layers for x in layer]
    engine.commit(labels)
    assert all(map(torch.equal, before, (x for layer in seen for x in layer)))
    assert all(
        map(torch.equal, first, (x for layer in engine.memories[0].recent[0].layers for x in layer))
    )


@both
def test_the_published_way_gives_the_same(cls, config):
    torch.manual_seed(0)
    model = cls(replace(config, layers=2, gap=1)).eval()
    ours = walk(model)[1]
    assert torch.allclose(ours, walk(make_published(model))[1], atol=1e-4)


@both
def test_a_batch_is_its_samples(cls, config):
    torch.manual_seed(0)
    model, frames, labels = (
        cls(replace(config, layers=2)).eval(),
        torch.randn(3, 2, 3, 64, 96),
        torch.randint(0, 3, (3, 2, 64, 96)),
    )
    with torch.no_grad():
        whole = forward_sequence(model, frames, labels, torch.tensor([2, 1]), False)
        for b, n in enumerate((2, 1)):
            alone = forward_sequence(
                model, frames[:, b : b + 1], labels[:, b : b + 1], torch.tensor([n]), False
            )
            assert all(torch.allclose(x[b : b + 1], y, atol=1e-4) for x, y in zip(whole, alone))


@both
def test_a_checkpoint_comes_back(cls, config, tmp_path):
    torch.manual_seed(0)
    model = cls(config).eval()
    zoo.save(model, tmp_path / "m", {})
    again = zoo.load(tmp_path / "m")
    assert (
        type(again) is cls
        and again.config == config
        and torch.equal(walk(model)[1], walk(again)[1])
    )


@pytest.mark.parametrize(
    "cls, name",
    [(AOT, n) for n in aot.AOT_VARIANTS if "swin" not in n]
    + [(DeAOT, n) for n in deaot.DEAOT_VARIANTS if "swin" not in n],
)
def test_every_variant_can_be_built(cls, name):
    config = (aot.AOT_VARIANTS | deaot.DEAOT_VARIANTS)[name]
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(
        dict(model.state_dict().items()) | {"LSTT.mask_token": torch.zeros(1, 1, config.dim)},
        assign=True,
    )
    assert sum(t.numel() for t in model.state_dict().values()) > 1e5


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: AOTEngine(AOT(FAMILIES[0][1]), max_memory_frames=0), "max_memory_frames"),
        (lambda: Memory(5, max_frames=-1), "at least 1"),
        (lambda: AOT(replace(FAMILIES[0][1], encoder="vgg")), "vgg"),
        (lambda: replace(FAMILIES[1][1], heads=8), "heads"),
        (lambda: AOTEngine(AOT(FAMILIES[0][1])).logits((9, 9)), "step"),
    ],
)
def test_what_cannot_be_is_said(make, says):
    with pytest.raises(Problem) as e:
        make()
    assert says in str(e.value) and "\n" not in str(e.value)
