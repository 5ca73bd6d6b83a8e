"""Parity of backbones and text encoder with published answers,
stage by stage, and what they do with odd input."""

import copy
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from transformers import RobertaModel, SwinBackbone, SwinConfig

from rvos_nb.core import Problem
from rvos_nb.data.augment import normalise_sentence
from rvos_nb.models.backbones import build_backbone, fold_time, resize_mask, sine_position_2d
from rvos_nb.models.start import load_backbone
from rvos_nb.models.swin import Swin
from rvos_nb.models.text import (
    ROBERTA_BASE,
    FeatureResizer,
    TextEncoder,
    build_text_encoder,
    load_tokenizer,
    make_tokenizer,
    sine_position_1d,
    small_text_config,
)
from rvos_nb.models.video_swin import SwinBlock, VideoSwin, fit_window, make_window_plan
from rvos_nb.train.trainer import recompute_layers
from rvos_nb.verify.cases import compare, image, load_case, load_filled, published_tensors

GOLDEN = Path(__file__).parent / "golden" / "referformer"
BESIDE = len(
    [k for k in load_case(GOLDEN / "resnet50.npz").meta["keys"] if not k[0].startswith("backbone.")]
)  # tensors of a whole model outside of its backbone


@contextmanager
def without_init():
    "The case brings every number, so drawing fresh ones is a waste."
    names = ("normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "uniform_")
    kept = {n: getattr(torch.nn.init, n) for n in names}
    for n in names:
        setattr(torch.nn.init, n, lambda t, *a, **k: t)
    try:
        yield
    finally:
        for n, f in kept.items():
            setattr(torch.nn.init, n, f)


def clip_of(case):
    "The padded batch (B, T, 3, H, W) of a case and its mask (B, T, H, W), True = padding."
    videos, step = case.meta["inputs"]["videos"], case.meta["inputs"]["size_divisibility"]
    height, width = (-(-max(v["size"][i] for v in videos) // step) * step for i in (0, 1))
    x, mask = (
        torch.zeros(len(videos), videos[0]["shape"][0], 3, height, width),
        torch.ones(len(videos), videos[0]["shape"][0], height, width, dtype=torch.bool),
    )
    for b, v in enumerate(videos):
        h, w = v["size"]
        x[b, :, :, :h, :w], mask[b, :, :h, :w] = (
            torch.from_numpy(image(v["image_seed"], tuple(v["shape"]))),
            False,
        )
    return x, mask


def part(case, names):
    "The case with only the answers whose name begins with one of `names`."
    return replace(case, answers={k: v for k, v in case.answers.items() if k.startswith(names)})


@pytest.mark.parametrize(
    "name", ["resnet50", "resnet50_batch", "swin_t", "video_swin_t", "video_swin_b"]
)
def test_backbone_equals_published(name):
    case = load_case(GOLDEN / f"{name}.npz")
    with without_init():
        net = build_backbone(case.meta["config"]["backbone"]).eval()
    load_filled(net, case.meta, case.arrays, prefix="backbone.0.body.")
    assert sorted(net.state_dict()) == sorted(
        k[0][16:] for k in case.meta["keys"] if k[0].startswith("backbone.")
    )
    x, mask = clip_of(case)
    with torch.inference_mode():
        levels = net(x)
    assert [level.shape[1] for level in levels] == net.channels
    outputs = [(f"backbone/{i}", level.numpy()) for i, level in enumerate(levels)]
    for i, level in enumerate(levels):
        small = resize_mask(mask, level.shape[-2:])
        outputs.append((f"backbone_mask/{i}", small.flatten(0, 1).numpy()))
    verdict = compare(part(case, ("backbone/", "backbone_mask/")), outputs)
    print(verdict)
    assert verdict.ok and verdict.count == 8, str(verdict)
    assert verdict.worst < 0.05, str(verdict)  # far inside, so that a slow drift shows


def test_text_encoder_equals_published():
    case = load_case(GOLDEN / "text_encoder.npz")
    with without_init():
        encoder, resizer = TextEncoder(case.meta["config"]).eval(), FeatureResizer(768, 256).eval()
    state = {k: torch.from_numpy(v) for k, v in published_tensors(case.meta, case.arrays)}
    state["text_encoder.embeddings.position_ids"] = torch.arange(514)[
        None
    ]  # files of that era keep it
    encoder.load_state_dict(
        {k[13:]: v for k, v in state.items() if k.startswith("text_encoder.")}, strict=True
    )
    resizer.load_state_dict(
        {k[8:]: v for k, v in state.items() if k.startswith("resizer.")}, strict=True
    )
    ids, mask = (
        torch.from_numpy(case.arrays["in/input_ids"]),
        torch.from_numpy(case.arrays["in/attention_mask"]) == 0,
    )
    with torch.inference_mode():
        words, sentence = encoder(ids, mask)
        hidden = RobertaModel.forward(
            encoder, ids, attention_mask=(~mask).long(), output_hidden_states=True
        ).hidden_states
        outputs = {
            "embeddings": hidden[0],
            "layer1": hidden[1],
            "layer3": hidden[3],
            "layer6": hidden[6],
            "last_hidden_state": words,
            "pooler_output": sentence,
            "words": resizer(words),
            "sentence": resizer(sentence),
            "position_1d": sine_position_1d(mask, 256),
            "position_2d": sine_position_2d(torch.from_numpy(case.arrays["in/mask2d"]), 256),
        }
    verdict = compare(case, [(k, v.numpy()) for k, v in outputs.items()])
    print(verdict)
    assert verdict.ok and verdict.count == 10, str(verdict)
    assert {k: case.meta["config"][k] for k in ROBERTA_BASE} == ROBERTA_BASE


@pytest.mark.parametrize(
    "name,parameters,tensors",
    [  # tensors: of the whole model
        ("resnet50", 23_454_912, 805),
        ("resnet101", 42_394_816, 1060),
        ("swin_t_p4w7", 27_520_698, 729),
        ("swin_s_p4w7", 48_838_602, 897),
        ("swin_b_p4w7", 86_745_016, 897),
        ("swin_l_p4w7", 194_998_164, 897),
        ("video_swin_t_p4w7", 27_844_326, 721),
        ("video_swin_s_p4w7", 49_502_934, 889),
        ("video_swin_b_p4w7", 87_630_792, 889),
    ],
)
def test_sizes_of_published_backbones(name, parameters, tensors):
    with torch.device("meta"):
        net = build_backbone(name)
    trained = sum(p.numel() for n, p in net.named_parameters())
    assert trained == parameters and len(net.state_dict()) == tensors - BESIDE
    assert len(net.channels) == len(net.strides) == 4


def test_video_swin_loads_with_and_without_index_and_trains():
    torch.manual_seed(0)
    net = VideoSwin("tiny", drop=0.0)
    state = net.state_dict()
    net.load_state_dict({k: v for k, v in state.items() if not k.endswith("index")}, strict=True)
    with pytest.raises(RuntimeError):
        net.load_state_dict({k: v for k, v in state.items() if "norm1" not in k}, strict=True)
    x, grads = torch.randn(1, 9, 3, 64, 64), []
    make_window_plan.cache_clear()
    with torch.inference_mode():
        net(x)  # what it keeps must serve training too
    for again in (False, True):
        if again:
            recompute_layers(net)
        net.zero_grad()
        sum(level.square().mean() for level in net.train()(x)).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(g.isfinite().all() for g in grads[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["swin_t_p4w7", "video_swin_t_p4w7"])
def test_recomputing_is_no_option_of_a_backbone(name):
    with pytest.raises(Problem, match=r"checkpointing.*expected some of .*drop"):
        build_backbone(name, checkpointing=True)


def published_way(block, x):
    """A block as published: pad, roll, cut, a mask for every window,
    attention with materialised weights, and undo."""
    b, size, c = len(x), tuple(x.shape[1:4]), x.shape[4]
    window, shift = fit_window(size, block.window, block.shifted, block.shrinks)
    padded = tuple(-(-s // k) * k for s, k in zip(size, window))
    y = torch.zeros(b, *padded, c).index_put(
        tuple(torch.meshgrid(torch.arange(b), *map(torch.arange, size), indexing="ij")),
        block.norm1(x),
    )
    label = torch.zeros(1, *padded, 1)
    cuts = [[(0, -k), (-k, -m), (-m, None)] if m else [(0, None)] for k, m in zip(window, shift)]
    for n, (t, i, j) in enumerate((t, i, j) for t in cuts[0] for i in cuts[1] for j in cuts[2]):
        label[0, slice(*t), slice(*i), slice(*j)] = n
    y = y.roll([-m for m in shift], (1, 2, 3))

    def cut(z):
        z = z.reshape(len(z), *(v for p, k in zip(padded, window) for v in (p // k, k)), -1)
        return z.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
            len(z), -1, window[0] * window[1] * window[2], z.shape[-1]
        )

    regions, tokens = cut(label)[..., 0], cut(y)
    n = tokens.shape[2]
    q, k, v = (
        block.attn.qkv(tokens)
        .reshape(b, -1, n, 3, block.attn.heads, c // block.attn.heads)
        .permute(3, 0, 1, 4, 2, 5)
    )
    scores = q @ k.mT * (c // block.attn.heads) ** -0.5 + block.attn.relative_position_bias_table[
        block.attn.relative_position_index[:n, :n]
    ].permute(2, 0, 1)
    scores = scores - 100.0 * (regions[:, :, None] != regions[:, :, :, None])[:, :, None]
    out = block.attn.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))
    grid = [p // k for p, k in zip(padded, window)]
    out = (
        out.reshape(b, *grid, *window, c)
        .permute(0, 1, 4, 2, 5, 3, 6, 7)
        .reshape(b, *padded, c)
        .roll(shift, (1, 2, 3))
    )
    x = x + out[:, : size[0], : size[1], : size[2]]
    return x + block.feed_forward(x)


def test_windows_equal_the_published_way(monkeypatch):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(40):
        video, width = bool(rng.integers(2)), int(rng.integers(2, 8))
        window = (int(rng.integers(2, 6)), width, width) if video else (1, width, width)
        block = SwinBlock(8, 2, window, bool(rng.integers(2)), video, 0.0)
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.5)
        x = torch.randn(
            int(rng.integers(1, 4)),
            int(rng.integers(1, 10)) if video else 1,
            *map(int, rng.integers(1, 20, 2)),
            8,
        )
        expected = published_way(block, x)
        monkeypatch.setattr(
            "rvos_nb.models.video_swin.piece_size", lambda device: int(rng.integers(1, 600))
        )
        with torch.inference_mode():
            pieces = block.eval()(x)
        for answer in (pieces, block.eval()(x), block.train()(x)):
            assert torch.allclose(answer, expected, rtol=1e-4, atol=1e-4), (
                window,
                block.shifted,
                video,
                tuple(x.shape),
            )
    grads = [
        torch.autograd.grad(f(x).square().sum(), list(block.parameters()))
        for f in (block, lambda x: published_way(block, x))
    ]
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in zip(*grads)
    )


def test_what_a_block_is_given_stays_as_it_is():
    block, x = SwinBlock(8, 2, (1, 3, 3), True, False, 0.0).eval(), torch.randn(1, 1, 5, 7, 8)
    kept = x.clone()
    with torch.inference_mode():
        block(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("training", [False, True])
def test_a_block_computes_in_half_precision(training):
    torch.manual_seed(0)
    block, x = (
        SwinBlock(16, 2, (8, 7, 7), True, True, 0.0).train(training),
        torch.randn(1, 10, 9, 15, 16),
    )
    exact = block(x).detach()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        cast = block(x)
    half = block.to(torch.bfloat16)(x.to(torch.bfloat16))
    for answer in (cast, half):
        assert float((answer.detach().float() - exact).abs().mean() / exact.abs().mean()) < 0.01


@pytest.mark.parametrize(
    "window,size",
    [(7, (224, 224)), (7, (75, 130)), (7, (9, 20)), (7, (1, 1)), (12, (97, 61)), (12, (40, 200))],
)
def test_swin_equals_transformers(window, size):
    torch.manual_seed(0)
    config = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=window,
        drop_path_rate=0.0,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    with without_init():
        theirs, ours = SwinBackbone(config).eval(), Swin("tiny", window).eval()
    table = "relative_position_bias_table"
    rename = {
        "attn.proj": "attention.o_proj",
        f"attn.{table}": f"attention.relative_position_bias.{table}",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    state, wanted = {}, theirs.state_dict()
    for name, p in ours.named_parameters():
        with torch.no_grad():
            p.normal_(
                1.0 if "norm" in name and name.endswith("weight") else 0.0,
                0.05 if p.ndim > 1 else 0.2,
            )
        if name.startswith("norm"):
            state[f"hidden_states_norms.stage{int(name[4]) + 1}{name[5:]}"] = p
        elif name.startswith("patch_embed"):
            state["swin.embeddings." + name[12:].replace("proj", "patch_embeddings.projection")] = p
        elif "attn.qkv" in name:
            for part, x in zip("qkv", p.chunk(3)):
                state["swin.encoder." + name.replace("attn.qkv", f"attention.{part}_proj")] = x
        else:
            for a, b in rename.items():
                name = name.replace(a, b) if ".blocks." in name else name
            state["swin.encoder." + name] = p
    assert not [
        k
        for k in theirs.load_state_dict(state, strict=False).missing_keys
        if not k.startswith("swin.layernorm.")
    ] and set(state) <= set(wanted)
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        levels, expected = ours(x[None]), theirs(x).feature_maps
    assert [level.shape for level in levels] == [e.shape for e in expected]
    worst = [float((a - e).abs().max() / e.abs().max()) for a, e in zip(levels, expected)]
    assert max(worst) < 1e-5, worst


@pytest.mark.parametrize("name", ["conv_tiny", "swin_t_p4w7", "video_swin_t_p4w7"])
@pytest.mark.parametrize("size", [(1, 33, 47), (3, 32, 32), (9, 40, 36)])
def test_odd_sizes_and_independent_clips(name, size):
    torch.manual_seed(0)
    net, (t, h, w) = build_backbone(name).eval(), size
    x = torch.randn(2, t, 3, h, w)
    with torch.inference_mode():
        both, first = net(x), net(x[:1])
    for level, alone, stride in zip(both, first, net.strides):
        assert level.shape[0] == 2 * t and level.shape[-2:] == (-(-h // stride), -(-w // stride))
        assert torch.allclose(level[:t], alone, atol=1e-5)


def noise_like(module, skip=()):
    "Fresh numbers for every floating-point tensor of a module, by its names."
    return {
        n: torch.randn_like(t)
        for n, t in module.state_dict().items()
        if t.is_floating_point() and not n.startswith(skip)
    }


def taken(module, file, rename=lambda n: n):
    "Whether a module holds the numbers of a file."
    state = module.state_dict()
    return all(torch.equal(state[n], file[rename(n)]) for n in state if rename(n) in file)


def test_start_from_imagenet_resnet_and_mobilenet():
    file = torchvision.models.resnet50().state_dict()
    with without_init():
        net = build_backbone("resnet50")
    dropped = load_backbone(net, file)
    assert (
        taken(net, file)
        and dropped["the classifier"] == ["fc.weight", "fc.bias"]
        and len(dropped["counters and indices"]) == 53
    )
    encoder, file = (
        torch.nn.ModuleDict(
            {
                "features": torchvision.models.mobilenet_v2(
                    norm_layer=torchvision.ops.FrozenBatchNorm2d
                ).features
            }
        ),
        torchvision.models.mobilenet_v2().state_dict(),
    )
    assert load_backbone(encoder, file)["the classifier"] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ] and taken(encoder, file)


def test_start_from_imagenet_swin():
    with without_init():
        whole, encoder = Swin("tiny"), Swin("tiny", stages=3)
    file = noise_like(whole, "norm") | {
        "norm.weight": torch.ones(768),
        "norm.bias": torch.ones(768),
        "head.weight": torch.ones(1000, 768),
        "head.bias": torch.ones(1000),
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
    }
    dropped = load_backbone(whole, file)
    assert taken(whole, {n: t for n, t in file.items() if not n.endswith("index")}) and set(
        dropped
    ) == {
        "the classifier",
        "the normalisation before the classifier",
        "masks for one size of picture",
        "counters and indices",
    }
    assert whole.layers[0]["blocks"][0].attn.relative_position_index.any()  # not the file's
    assert all((getattr(whole, f"norm{i}").weight == 1).all() for i in range(4))
    later = load_backbone(encoder, file)["stages that this backbone does not have"]
    assert len(later) == 3 + 2 * 13 and all(
        n.startswith(("layers.3.", "layers.2.downsample.")) for n in later
    )


def test_start_from_kinetics():
    with without_init():
        net = VideoSwin("tiny")
    file = {
        "backbone."
        + n.replace("downsamples.", "layers.")
        .replace("reduction", "downsample.reduction")
        .replace(".norm.", ".downsample.norm.")
        if n.startswith("downsamples")
        else "backbone." + n: t
        for n, t in noise_like(net).items()
    }
    file |= {
        "backbone.patch_embed.proj.weight": torch.randn(96, 3, 2, 4, 4),
        "backbone.norm.weight": torch.ones(768),
        "backbone.norm.bias": torch.ones(768),
        "cls_head.fc_cls.weight": torch.ones(400, 768),
        "cls_head.fc_cls.bias": torch.ones(400),
    }
    dropped = load_backbone(net, file)
    assert dropped == {
        "the normalisation before the classifier": ["norm.weight", "norm.bias"],
        "parts beside the backbone": ["cls_head.fc_cls.weight", "cls_head.fc_cls.bias"],
    }
    assert torch.equal(
        net.patch_embed.proj.weight, file["backbone.patch_embed.proj.weight"].sum(2, keepdim=True)
    )
    assert torch.equal(net.downsamples[2].norm.bias, file["backbone.layers.2.downsample.norm.bias"])
    assert torch.equal(
        net.layers[3]["blocks"][1].attn.qkv.weight,
        file["backbone.layers.3.blocks.1.attn.qkv.weight"],
    )


@pytest.mark.parametrize(
    "change,said",
    [
        (
            lambda f: f.pop("layers.1.blocks.0.norm1.bias"),
            "1 missing (layers.1.blocks.0.norm1.bias)",
        ),
        (
            lambda f: f.update({"layers.1.blocks.2.norm1.bias": torch.ones(2)}),
            "1 left over (layers.1.blocks.2.norm1.bias)",
        ),
        (
            lambda f: f.update({"absolute_pos_embed": torch.ones(1, 3136, 96)}),
            "1 left over (absolute_pos_embed)",
        ),
        (
            lambda f: f.update(
                {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(529, 3)}
            ),
            "(529, 3) for (169, 3)",
        ),
    ],
)
def test_a_start_file_of_another_network_is_refused(change, said):
    net = Swin("tiny", stages=2)
    file, before = noise_like(net, "norm"), net.patch_embed.proj.weight.clone()
    change(file)
    with pytest.raises(Problem) as e:
        load_backbone(net, file, "swin.pth")
    assert (
        said in str(e.value)
        and str(e.value).startswith("swin.pth")
        and torch.equal(net.patch_embed.proj.weight, before)
    )


def test_conv_tiny_can_be_saved():
    net = build_backbone("conv_tiny")
    assert all(p.is_contiguous() for p in net.parameters())  # safetensors refuses others


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: fold_time(torch.zeros(3, 64, 64)), "(B, T, 3, H, W)"),
        (lambda: build_backbone("resnet18"), "resnet50"),
        (lambda: build_backbone("conv_tiny", depth=3), "depth"),
        (lambda: build_backbone("conv_tiny", time_strides=(6,)), "time_strides"),
        (lambda: VideoSwin("huge"), "tiny"),
        (lambda: Swin("tiny", stages=5), "1 to 4 stages"),
        (lambda: Swin("tiny")(torch.zeros(2, 3, 32, 32)), "(B, T, 3, H, W)"),
        (lambda: sine_position_2d(torch.zeros(1, 2, 2, dtype=torch.bool), 6), "multiple of 4"),
        (lambda: normalise_sentence("  "), "at least one word"),
        (lambda: load_tokenizer("/nonexistent"), "no tokenizer"),
        (lambda: TextEncoder(small_text_config(8)).encode(["a"]), "no tokenizer"),
    ],
)
def test_bad_input_is_one_clear_line(call, said):
    with pytest.raises(Problem) as e:
        call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_tokenizer_of_another_family_is_refused(tmp_path):
    import json

    make_tokenizer(["red"]).save_pretrained(tmp_path)
    held = json.loads((tmp_path / "tokenizer.json").read_text())
    held["model"]["vocab"] |= {"<pad>": 0, "<s>": 1}
    for t in held["added_tokens"]:
        t["id"] = held["model"]["vocab"][t["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(Problem) as e:
        load_tokenizer(tmp_path)
    assert "0, 1, 2" in str(e.value)


def test_tokenizer_fuzz(tmp_path):
    rng = np.random.default_rng(1)
    words = [
        "red",
        "ball",
        "left",
        "zebra's",
        "größer",
        "<s>",
        "</s>",
        "<pad>",
        "球",
        "🎈",
        "...",
        "-",
        "a" * 300,
    ]
    tokenizer = make_tokenizer(words[:4])
    encoder = TextEncoder(
        small_text_config(len(tokenizer), hidden=16, layers=1, heads=2), tokenizer
    ).eval()
    for _ in range(30):
        text = " ".join(rng.choice(words, rng.integers(1, 9)))
        with torch.inference_mode():
            w, mask, s = encoder.encode([text, "red ball"])
        assert w.isfinite().all() and s.isfinite().all() and w.shape[:2] == mask.shape


# The text encoders: files, the Hub, and what is remembered

SENTENCES = [
    "the red ball",
    "a red ball left of the big blue box",
    "Ball",
    "the the the ball",
    "a box, the red one",
]
TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


def write_tokenizer(family, folder):
    "A vocabulary in the form of the published files: byte pairs for RoBERTa, word pieces for BERT."
    from tokenizers.pre_tokenizers import ByteLevel

    if family == "bert":
        (folder / "vocab.txt").write_text(
            "\n".join(
                [
                    "[PAD]",
                    "[UNK]",
                    "[CLS]",
                    "[SEP]",
                    "[MASK]",
                    *[
                        "the",
                        "red",
                        "ball",
                        "left",
                        "of",
                        "big",
                        "blue",
                        "box",
                        "one",
                        "a",
                        ",",
                        "##s",
                    ],
                ]
            )
        )
    else:
        vocabulary = [
            "<s>",
            "<pad>",
            "</s>",
            "<unk>",
            *sorted(ByteLevel.alphabet()),
            "re",
            "red",
            "Ġred",
            "<mask>",
        ]
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d\nĠ red\n")


@pytest.fixture(params=["roberta", "bert"])
def saved(request, tmp_path):
    "A folder with a tiny encoder and its tokenizer, and the encoder."
    folder = tmp_path / "encoder"
    folder.mkdir()
    write_tokenizer(request.param, folder)
    torch.manual_seed(0)
    encoder = build_text_encoder(
        TINY | {"model_type": request.param, "pad_token_id": int(request.param == "roberta")},
        tokenizer=load_tokenizer(folder),
    )
    encoder.save_pretrained(folder)
    return folder, encoder


def said_by(call):
    with pytest.raises(Problem) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


@torch.no_grad()
def test_saved_encoder_comes_back_from_folder_and_hub_cache(saved, tmp_path, monkeypatch):
    folder, encoder = saved
    words, mask, sentence = encoder.encode(SENTENCES)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", False
    )  # nothing but our own rule keeps it off the network
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("opened a connection"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    message = said_by(lambda: build_text_encoder("roberta-base"))
    assert all(w in message for w in ("folder", "Hub cache", "online=True"))
    assert "no tokenizer" in said_by(lambda: load_tokenizer("roberta-base"))
    assert "no such folder" in said_by(lambda: build_text_encoder(tmp_path / "nowhere"))
    kept = tmp_path / "hub" / "models--FacebookAI--roberta-base"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, kept / "snapshots" / ("0" * 40))
    for source in (folder, str(folder), "roberta-base", "FacebookAI/roberta-base"):
        again = build_text_encoder(source)
        assert (
            type(again) is type(encoder)
            and not again.training
            and again.config._attn_implementation == "sdpa"
        )
        assert all(
            torch.equal(a, b) for a, b in zip(again.encode(SENTENCES), (words, mask, sentence))
        )
    (kept / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    assert "cannot be read" in said_by(lambda: build_text_encoder("roberta-base"))


@torch.no_grad()
def test_published_form_of_old_language_models(saved):
    """A pickle with the head of a language model,
    LayerNorms called gamma and beta, and the constant positions."""
    folder, encoder = saved
    prefix, states = encoder.config.model_type + ".", encoder.state_dict()

    def old(n):
        return prefix + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    file = {old(n): t for n, t in states.items()} | {
        prefix + "embeddings.position_ids": torch.arange(40)[None],
        "lm_head.bias": torch.zeros(320),
    }
    (folder / "model.safetensors").unlink()
    torch.save(file, folder / "pytorch_model.bin")
    assert all(
        torch.equal(t, states[n]) for n, t in build_text_encoder(folder).state_dict().items()
    )
    torch.save({n: t for n, t in file.items() if "pooler" not in n}, folder / "pytorch_model.bin")
    assert "pooler=False" in said_by(lambda: build_text_encoder(folder))
    assert build_text_encoder(folder, pooler=False).encode(["red"])[2] is None
    torch.save({n: t for n, t in file.items() if "layer.1" not in n}, folder / "pytorch_model.bin")
    assert "layer.1" in said_by(lambda: build_text_encoder(folder, pooler=False))


def test_pickled_weights_run_no_code(saved):
    folder, canary = saved[0], saved[0] / "ran"

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Command()}, folder / "pytorch_model.bin")
    assert "cannot be read" in said_by(lambda: build_text_encoder(folder)) and not canary.exists()


def test_wrong_folders_and_tokenizers_are_named(saved):
    folder, encoder = saved
    said = json.loads((folder / "config.json").read_text())
    for change, word in (
        ({"model_type": "t5"}, "t5"),
        ({"hidden_size": 32}, "cannot be read"),
        ({"vocab_size": 7}, "tokens"),
    ):
        (folder / "config.json").write_text(json.dumps(said | change))
        assert word in said_by(lambda: build_text_encoder(folder)), change
    assert "padding" in said_by(
        lambda: type(encoder)(TINY | {"pad_token_id": 5}, encoder.tokenizer)
    )


def test_the_hub_is_asked_only_on_request(saved, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: (
            asked.append((name, "*.safetensors" in allow_patterns)) or str(folder)
        ),
    )
    asked = []
    build_text_encoder("some-name/of-a-model", online=True)
    assert asked == [("some-name/of-a-model", True)]
    load_tokenizer("some-name/of-a-model", online=True)
    assert asked[1:] == [("some-name/of-a-model", False)]


@torch.no_grad()
def test_batch_and_single_sentence_agree(saved):
    encoder = saved[1]
    rng = np.random.default_rng(0)
    texts = [
        " ".join(
            rng.choice(
                ["the", "red", "ball", "left", "of", "big", "blue", "box"], rng.integers(1, 7)
            )
        )
        for _ in range(12)
    ]
    texts += texts[:3]
    words, mask, sentence = encoder.encode(texts)
    ids, plain = encoder.tokenise(texts)
    whole, pooled = encoder(ids, plain)  # one batch, nothing remembered
    assert (
        torch.equal(mask, plain)
        and torch.allclose(words[~mask], whole[~mask], atol=1e-5)
        and torch.allclose(sentence, pooled, atol=1e-5)
    )
    if encoder.config.model_type == "roberta":
        assert torch.allclose(words, whole, atol=1e-5)  # padded rows as well, which WaveCL averages
    for e, text in enumerate(texts):
        encoder.sentence_cache.select(None)
        alone, _, single = encoder.encode([text])
        assert torch.allclose(alone[0], words[e, ~mask[e]], atol=1e-5) and torch.allclose(
            single[0], sentence[e], atol=1e-5
        )


def test_a_sentence_is_the_same_whatever_was_asked_before():
    "To the last bit: on it rests that workers and interrupted runs give the bytes of one process."
    texts = ["red ball", "the big red ball left of the box", "box"]
    tokenizer = make_tokenizer(texts)
    config = small_text_config(len(tokenizer), hidden=96, layers=2, heads=2)
    encoder = TextEncoder(config, tokenizer).eval()
    with torch.no_grad():
        alone = encoder.encode(texts[:1])[0]
        encoder.sentence_cache.select(None)
        beside = encoder.encode(texts)[0][:1, : alone.shape[1]]
    assert torch.equal(alone, beside)


def test_a_sentence_is_read_once_per_set_of_weights(saved):
    encoder, read = saved[1], []
    encoder.embeddings.register_forward_hook(lambda _, inputs, out: read.append(len(out)))

    def ask(*texts):
        before = len(read)
        with torch.no_grad():
            out = encoder.encode(list(texts))
        return sum(read[before:]), out

    assert (
        ask(*SENTENCES, *SENTENCES)[0] == 5
        and ask(*SENTENCES[::-1])[0] == 0
        and ask("red", "Ball", "red")[0] == 1
    )
    first = ask("red")[1]
    first[0].zero_()  # what was handed out is the caller's own
    assert ask("red")[1][0].abs().sum() > 0

    def trained():
        encoder.train().eval()

    def stepped():
        encoder.pooler.dense.bias.grad = torch.ones_like(encoder.pooler.dense.bias)
        torch.optim.SGD([encoder.pooler.dense.bias], 0.1).step()

    def copied():
        with torch.no_grad():
            encoder.pooler.dense.bias.copy_(torch.zeros(16))

    for change in (
        trained,
        lambda: encoder.load_state_dict(encoder.state_dict()),
        lambda: encoder.double(),
        lambda: encoder.float(),
        stepped,
        copied,
    ):
        ask("red")
        change()
        assert ask("red")[0] == 1 and ask("red")[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert ask("red")[0] == 1
    twin = copy.deepcopy(encoder)
    assert not twin.sentence_cache.vectors and encoder.sentence_cache.vectors
    encoder.sentence_cache.limit = 2
    ask(*SENTENCES)
    assert len(encoder.sentence_cache.vectors) == 2


def test_training_reads_every_copy_and_inference_answers_can_be_trained_on(saved):
    encoder, read = saved[1], []
    encoder.embeddings.register_forward_hook(lambda _, inputs, out: read.append(len(out)))
    words, _, _ = encoder.train().encode(["red ball", "red ball", "RED  ball"])
    assert (
        read == [3] and not torch.allclose(words[0], words[1]) and words.requires_grad
    )  # dropout differs
    assert torch.equal(
        *(encoder.tokenise([t])[0] for t in ("RED  ball", "red ball"))
    )  # lower case in training
    encoder.eval().requires_grad_(False)
    with torch.inference_mode():
        encoder.encode(["red"])
    with torch.no_grad():
        words, _, _ = encoder.encode(["red"])
    layer = torch.nn.Linear(16, 1)
    layer(words).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_encoder_made_without_storage_answers_alike(saved):
    _, encoder = saved
    with torch.device("meta"):
        made = type(encoder)(encoder.config, encoder.tokenizer)
    made = made.to_empty(device="cpu").eval()
    for b in made.buffers():
        b.fill_(3)  # what lies there by chance
    made.load_state_dict(encoder.state_dict())
    assert torch.equal(made.encode(SENTENCES)[0], encoder.encode(SENTENCES)[0])
