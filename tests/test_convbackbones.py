"""ConvNeXt and ConvMAE: parity with published answers, with timm and with a naive path,
odd sizes, start files, and how a model holds them."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rvos_nb.core import Problem
from rvos_nb.models import zoo
from rvos_nb.models.backbones import build_backbone, recognise_backbone, run_by_frames, wrap_body
from rvos_nb.models.convmae import RelativeAttention
from rvos_nb.models.referformer import ReferFormer, ReferFormerConfig, referformer_options
from rvos_nb.models.start import load_backbone, load_start
from rvos_nb.models.text import make_tokenizer, small_text_config
from rvos_nb.verify.cases import compare, load_case, load_filled
from rvos_nb.verify.referformer import pad_clips

GOLDEN = Path(__file__).parent / "golden" / "mutr"
SMALL = {
    "convnext_large": {"depths": [1, 2, 2, 1], "dims": [8, 16, 24, 32]},
    "convmae_base": {"depths": [1, 2, 3], "dims": [8, 12, 24], "heads": 3},
}
both = pytest.mark.parametrize("name", SMALL)


def make_small(name):
    "A small backbone whose every tensor counts: none is zero, one or a millionth."
    torch.manual_seed(0)
    net = build_backbone(name, **SMALL[name]).eval()
    with torch.no_grad():
        for n, p in net.named_parameters():
            gain = (p.ndim == 1 and n.endswith("weight")) or n.endswith("gamma")
            p.copy_(gain + torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.3))
    return net


# Parity


@both
def test_levels_equal_published(name):
    case = load_case(GOLDEN / f"{name}.npz")
    assert case.meta["config"]["backbone"] == name
    with torch.device("meta"):
        wrapped = wrap_body(build_backbone(name))
    wrapped.to_empty(device="cpu").eval()
    with torch.inference_mode():
        load_filled(wrapped, case.meta, case.arrays, prefix="backbone.0.")
        levels = wrapped["body"](pad_clips(case.meta["inputs"])[0])
    assert [level.shape[1] for level in levels] == wrapped["body"].channels
    answers = {k: v for k, v in case.answers.items() if k.startswith("backbone/")}
    outputs = [(f"backbone/{i}", level.numpy()) for i, level in enumerate(levels)]
    verdict = compare(replace(case, answers=answers), outputs)
    print(verdict)
    assert verdict.ok and verdict.count == 4, str(verdict)
    assert verdict.worst < 0.05, str(verdict)  # far inside, so that a slow drift shows


@pytest.mark.parametrize(
    "name,parameters,tensors",
    [("convnext_large", 196_233_024, 348), ("convmae_base", 84_672_000, 229)],
)
def test_sizes_of_published_backbones(name, parameters, tensors):
    with torch.device("meta"):
        net = build_backbone(name)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    assert len(net.channels) == len(net.strides) == 4


@pytest.mark.parametrize("size", [(64, 64), (75, 130), (32, 47)])
def test_convnext_is_timms_where_norms_are_left_out(size):
    net, options = make_small("convnext_large"), SMALL["convnext_large"]
    theirs = timm.create_model("convnext_tiny", pretrained=False, features_only=True, **options)
    state = net.state_dict()
    names = {
        n: n.replace("stem_", "stem.").replace("stages_", "stages.") for n in theirs.state_dict()
    }
    theirs.load_state_dict({n: state[ours] for n, ours in names.items()}, strict=True)
    net.norm_layers = nn.ModuleList(nn.Identity() for _ in range(4))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        levels, expected = net(x[None]), theirs.eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(levels, expected, strict=True))


# Attention


def published_way(attention, x):
    """Attention as published: pad after the norm, cut, lay the bias out in full, materialise the
    weights, undo."""
    n, h, w, c = x.shape
    side_h, side_w = (attention.window or s for s in (h, w))
    padded = F.pad(x, (0, 0, 0, -w % side_w, 0, -h % side_h))
    out = torch.zeros_like(padded)
    d = c // attention.heads
    tables = []
    for table, side in ((attention.rel_pos_h, side_h), (attention.rel_pos_w, side_w)):
        stretched = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
        tables.append([[stretched[i - j + side - 1] for j in range(side)] for i in range(side)])
    by_row, by_column = (torch.stack([torch.stack(line) for line in t]) for t in tables)
    for top in range(0, padded.shape[1], side_h):
        for left in range(0, padded.shape[2], side_w):
            window = padded[:, top : top + side_h, left : left + side_w].reshape(n, -1, c)
            q, k, v = (
                attention.qkv(window).view(n, -1, 3, attention.heads, d).permute(2, 0, 3, 1, 4)
            )
            place = q.reshape(n, attention.heads, side_h, side_w, d)
            rows = torch.einsum("nahwd,hkd->nahwk", place, by_row)[..., :, None]
            columns = torch.einsum("nahwd,wkd->nahwk", place, by_column)[..., None, :]
            bias = (rows + columns).reshape(n, attention.heads, side_h * side_w, -1)
            y = ((q @ k.mT) / d**0.5 + bias).softmax(-1) @ v
            y = attention.proj(y.transpose(1, 2).reshape(n, side_h, side_w, c))
            out[:, top : top + side_h, left : left + side_w] = y
    return out[:, :h, :w]


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 5), (9, 13), (2, 17)])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_equals_the_published_way(window, size):
    torch.manual_seed(0)
    attention = RelativeAttention(24, 3, window, window or 6).double()
    for p in attention.parameters():
        nn.init.normal_(p, std=0.4)
    x = torch.randn(2, *size, 24, dtype=torch.double)
    ours, expected = attention(x), published_way(attention, x)
    assert torch.allclose(ours, expected, atol=1e-9)
    weight, parameters = torch.randn_like(x), list(attention.parameters())
    grads = [torch.autograd.grad((y * weight).sum(), parameters) for y in (ours, expected)]
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*grads))


# Sizes, pieces, precision


@both
@pytest.mark.parametrize("size", [(1, 33, 47), (3, 32, 32), (2, 95, 63), (2, 250, 40)])
def test_odd_sizes_and_independent_frames(name, size):
    net, (t, h, w) = make_small(name), size
    x = torch.randn(2, t, 3, h, w)
    with torch.inference_mode():
        levels, alone = net(x), net(x[1:, -1:])
    shape = h // 4, w // 4
    for level, single, channels in zip(levels, alone, net.channels, strict=True):
        assert tuple(level.shape) == (2 * t, channels, *shape)
        assert torch.allclose(level[-1:], single, atol=1e-4)
        shape = shape[0] // 2, shape[1] // 2


@both
def test_frames_in_pieces_answer_alike(name, monkeypatch):
    net, x = make_small(name), torch.randn(2, 3, 3, 70, 45)
    whole = net(x)
    for limit in (1, 400, 10**6):
        monkeypatch.setattr("rvos_nb.models.pieces.piece_size", lambda device, n=limit: n)
        with torch.inference_mode():
            levels = net(x)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(levels, whole, strict=True))


def test_pieces_are_as_large_as_asked(monkeypatch):
    counted, frames = [], torch.randn(7, 3, 40, 48)  # of 10×12 cells

    def work(x):
        counted.append(len(x))
        return [x]

    monkeypatch.setattr("rvos_nb.models.pieces.piece_size", lambda device: 360)
    with torch.no_grad():
        assert torch.equal(run_by_frames(work, frames)[0], frames) and counted == [3, 3, 1]
    assert run_by_frames(work, frames)[0] is frames


@both
def test_small_frames_and_wrong_shapes_are_refused(name):
    net = make_small(name)
    for shape, said in (((1, 1, 3, 31, 64), "31×64"), ((1, 3, 64, 64), "(B, T, 3, H, W)")):
        with pytest.raises(Problem, match="backbone input") as e:
            net(torch.zeros(shape))
        assert said in str(e.value)


@both
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(name, training):
    net, x = make_small(name), torch.randn(1, 2, 3, 64, 80)
    exact = [level.detach() for level in net(x)]
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        cast = net(x)
    half = net.to(torch.bfloat16)(x.to(torch.bfloat16))
    for levels in (cast, half):
        for level, expected in zip(levels, exact, strict=True):
            error = (level.detach().float() - expected).abs().mean() / expected.abs().mean()
            assert error < 0.03, error


@both
def test_all_of_it_learns(name):
    net = make_small(name).train()
    for drop in (m for m in net.modules() if type(m).__name__ in ("DropPath", "StochasticDepth")):
        drop.eval()
    sum((x * torch.randn_like(x)).sum() for x in net(torch.randn(1, 2, 3, 64, 96))).backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@both
@pytest.mark.parametrize("drop", [0.0, 0.9])
def test_stochastic_depth(name, drop):
    torch.manual_seed(0)
    net = build_backbone(name, **SMALL[name], drop=drop).train()
    for n, p in net.named_parameters():
        if n.endswith("gamma"):
            p.data.fill_(1)
    x = torch.randn(1, 1, 3, 64, 64)
    with torch.no_grad():
        answers = [net(x)[2] for _ in range(6)]
    assert (max((a - answers[0]).abs().max() for a in answers) > 0) == bool(drop)


# Configurations


@both
@pytest.mark.parametrize(
    "change", [{"depths": [1, 2]}, {"dims": [8]}, {"width": 3}], ids=["depths", "dims", "unknown"]
)
def test_wrong_options_are_named(name, change):
    with pytest.raises(Problem) as e:
        build_backbone(name, **SMALL[name] | change)
    assert next(iter(change)) in str(e.value)


def test_heads_divide_the_width():
    with pytest.raises(Problem, match="5 heads"):
        build_backbone("convmae_base", **SMALL["convmae_base"] | {"heads": 5})


@both
def test_size_is_recognised(name):
    for options in ({}, SMALL[name]):
        with torch.device("meta"):
            state = build_backbone(name, **options).state_dict()
        shapes = {f"body.{n}": tuple(t.shape) for n, t in state.items()}
        assert recognise_backbone(shapes, "body.") == (name, options)


# In a model


def test_norms_have_one_name_and_stay_with_their_network():
    net, x = make_small("convnext_large"), torch.randn(1, 1, 3, 64, 64)
    with torch.inference_mode():
        before = net(x)
    wrapped = wrap_body(net)
    names = [n for n, _ in wrapped.named_parameters()]
    assert names == list(wrapped.state_dict()) and len(set(names)) == len(names)
    assert {n.split(".")[0] for n in names} == {"body", "norm_layers"}
    assert not [n for n in net.state_dict() if "norm_layers" in n]
    for twin in (wrapped, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(before, twin["body"](x), strict=True))
        twin.double()
        assert twin["body"](x.double())[0].dtype == torch.float64
        assert twin["body"].norm_layers is twin["norm_layers"]


def small_model(name):
    words = make_tokenizer(["a red ball"])
    config = ReferFormerConfig(
        backbone=name,
        backbone_options=SMALL[name],
        text=small_text_config(len(words), heads=1),
        hidden_dim=64,
        dim_feedforward=64,
        mask_dim=32,
        enc_layers=1,
        dec_layers=1,
    )
    torch.manual_seed(0)
    return ReferFormer(config, words).eval()


@both
def test_a_model_holds_it_under_published_names(name, tmp_path):
    model = small_model(name)
    case = load_case(GOLDEN / f"{name}.npz")
    published = {n.split(".")[2] for n, *_ in case.meta["keys"] if n.startswith("backbone.0.")}
    ours = {n for n in model.state_dict() if n.startswith("backbone.")}
    assert {n.split(".")[2] for n in ours} == published
    found = referformer_options(model.state_dict(), {})
    assert (found["backbone"], found["backbone_options"]) == (name, SMALL[name])
    zoo.save(model, tmp_path / "model", {})
    again, x = zoo.load(tmp_path / "model"), torch.randn(1, 2, 3, 64, 80)
    with torch.inference_mode():
        for a, b in zip(model.body(x), again.body(x), strict=True):
            assert torch.equal(a, b)
    video = torch.randint(256, (2, 40, 70, 3), dtype=torch.uint8)
    ours, same = (m.refer(m.see(video, short_side=37), ["a red ball"]) for m in (model, again))
    assert ours.logits.shape == (1, 2, 9, 16) and torch.equal(ours.logits, same.logits)


# Start files


def draw_file(module, skip=()):
    "Fresh numbers for the tensors of a module, but for those whose names hold one of `skip`."
    state = module.state_dict().items()
    return {n: torch.randn_like(t) for n, t in state if not any(s in n for s in skip)}


def authors_name(name):
    "The name of a tensor in the file of ConvNeXt's authors."
    part, *rest = name.split(".")
    if part == "stem":
        return ".".join(["downsample_layers.0", *rest])
    stage, kind, *rest = rest
    if kind == "downsample":
        return ".".join([f"downsample_layers.{stage}", *rest])
    rest = ".".join(rest).replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return f"stages.{stage}.{rest}"


@pytest.mark.parametrize("authors", [True, False], ids=["authors", "timm"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["in a model", "alone"])
def test_convnext_starts_from_imagenet(authors, wrapped, tmp_path):
    model = small_model("convnext_large")
    net = model.body if wrapped else make_small("convnext_large")
    norms = copy.deepcopy(net.norm_layers)
    file = draw_file(net, ["norm_layers"])
    classifier = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    if not authors:
        classifier = {f"head.{n}": t for n, t in classifier.items()}
    classifier |= {"head.weight": torch.ones(1000, 32), "head.bias": torch.ones(1000)}
    given = {authors_name(n) if authors else n: t for n, t in file.items()} | classifier
    if wrapped:
        torch.save({"model": given}, tmp_path / "convnext.pth")
        load_start(model, str(tmp_path / "convnext.pth"))
    else:
        dropped = load_backbone(net, given)
        assert {n for names in dropped.values() for n in names} == set(classifier)
    state = net.state_dict()
    assert all(torch.equal(state[n], t) for n, t in file.items())
    assert all(torch.equal(a, b) for a, b in zip(net.norm_layers.parameters(), norms.parameters()))


@pytest.mark.parametrize("kind", ["painting", "classifying", "detecting"])
def test_convmae_starts_from_its_own_file(kind):
    net = make_small("convmae_base")
    own = [] if kind == "detecting" else ["norm3.", "norm4.", "rel_pos"]
    file, before = draw_file(net, own), copy.deepcopy(net.state_dict())
    rest = {"norm.weight": torch.ones(24), "norm.bias": torch.ones(24)}
    if kind == "painting":
        rest |= {
            "mask_token": torch.zeros(1, 1, 16),
            "decoder_pos_embed": torch.zeros(1, 196, 16),
            "decoder_blocks.0.norm1.weight": torch.ones(16),
            "stage1_output_decode.weight": torch.ones(24, 8, 4, 4),
        }
    else:
        rest |= {"fc_norm.weight": torch.ones(24), "head.bias": torch.ones(1000)}
    dropped = load_backbone(net, file | rest)
    assert {n for names in dropped.values() for n in names} == set(rest)
    for n, t in net.state_dict().items():
        assert torch.equal(t, file.get(n, before[n])), n


@both
@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_a_start_file_of_another_network_is_refused(name, change):
    net = make_small(name)
    file, before = draw_file(net, ["norm_layers"]), copy.deepcopy(net.state_dict())
    last = next(n for n in reversed(file) if "mlp" in n)
    if change == "missing":
        del file[last]
    elif change == "left over":
        file["stages.0.blocks.9.more"] = torch.ones(1)
    else:
        file[last] = torch.ones(3)
    with pytest.raises(Problem, match=change):
        load_backbone(net, file)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
