"""Parity of deformable attention and of the dynamic mask head with the published ones, and their bad inputs."""
import json
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from rvos_nb.models.crossmodal import Attention, CrossModalFPN, VisionLanguageFusion
from rvos_nb.models.deformable import DeformableTransformer
from rvos_nb.models.heads import MLP, aligned_bilinear, dynamic_mask_head, dynamic_size, pixel_centres
from rvos_nb.ops.deform_attn import MSDeformAttn, ms_deform_attn

GOLDEN = Path(__file__).parent / "golden" / "referformer"


def fill(name, shape):
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size=tuple(shape)).astype(np.float32)
    if len(shape) >= 2:
        return noise / np.float32(np.sqrt(prod(shape[1:])))
    return 1 + np.float32(0.1) * noise if name.endswith("weight") else np.float32(0.1) * noise


def image(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32))


def case(name):
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return json.loads(str(arrays["meta"])), {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "meta"}


def agree(found, expected, stride=None):
    found = found.detach()
    if stride: found = found[tuple(slice(None, None, s) for s in stride)]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_core_matches_published_values_and_gradients():
    _, a = case("deform_attn")
    shapes = [tuple(s) for s in a["in/core/spatial_shapes"].tolist()]
    inputs = [a[f"in/core/{k}"].requires_grad_() for k in ("value", "sampling_locations", "attention_weights")]
    out = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    agree(out, a["out/core/output"])
    out.backward(a["in/core/grad_output"])
    for x, name in zip(inputs, ("value", "sampling_locations", "attention_weights")):
        agree(x.grad, a[f"out/core/grad_{name}"])


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_module_matches_published_values_and_gradients(kind):
    meta, a = case("deform_attn")
    module = MSDeformAttn()
    module.load_state_dict({k: torch.from_numpy(fill(k, shape)) for k, shape, _ in meta["keys"]})
    shapes = [tuple(s) for s in a["in/module/spatial_shapes"].tolist()]
    query, value, grad = image(26, (2, 9, 256)).requires_grad_(), image(27, (2, 65, 256)).requires_grad_(), image(28, (2, 9, 256))
    reference = a[f"in/module/reference_{kind}"]
    out = module(query, reference, value, shapes, a["in/module/padding_mask"])
    out.backward(grad)
    locations, weights = module.sample(query, reference, shapes)
    found = {"output": out, "sampling_locations": locations, "attention_weights": weights, "grad_query": query.grad, "grad_input": value.grad,
             "grad_sampling_offsets_weight": module.sampling_offsets.weight.grad, "grad_attention_weights_weight": module.attention_weights.weight.grad,
             "grad_value_proj_weight": module.value_proj.weight.grad, "grad_output_proj_bias": module.output_proj.bias.grad}
    for name, x in found.items():
        agree(x, a[f"out/module/{kind}/{name}"], meta["outputs"][f"module/{kind}/{name}"]["stride"])


def test_dynamic_mask_head_matches_published():
    _, a = case("dynamic_mask_head")
    features = image(41, (2, 2, 256, 9, 12))
    for name, n, reference in (("rel_coord", 2153, a["in/reference_points"].view(2, 2, 3, 2)), ("no_rel_coord", 2137, None)):
        params = 0.1 * image(42, (2, 6, n)).view(2, 2, 3, n)
        agree(dynamic_mask_head(features, params, reference, a["in/sizes"]).view(2, 6, 9, 12), a[f"out/{name}"])
        assert dynamic_size(relative=reference is not None) == n
    for factor in (2, 4): agree(aligned_bilinear(image(44, (2, 3, 5, 7)), factor), a[f"out/aligned_bilinear_{factor}"])
    x, y = pixel_centres(3, 4)
    agree(torch.stack([x.expand(3, 4), y[:, None].expand(3, 4)], -1).reshape(12, 2), a["out/locations"])


def slow_reading(value, shapes, locations, weights):
    """One query at a time, four neighbours at a time: (Lq, heads*dim) of batch item 0."""
    out, start = torch.zeros(locations.shape[1], *value.shape[2:]), 0
    for level, (h, w) in enumerate(shapes):
        cells = value[0, start:start + h * w].view(h, w, *value.shape[2:])
        start += h * w
        for index in np.ndindex(locations.shape[1], value.shape[2], locations.shape[4]):
            q, m, k = index
            x, y = (locations[0, q, m, level, k].double() * torch.tensor([w, h]) - 0.5).tolist()
            for i in (int(np.floor(y)), int(np.floor(y)) + 1):
                for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= i < h and 0 <= j < w:
                        out[q, m] += weights[0, q, m, level, k] * (1 - abs(x - j)) * (1 - abs(y - i)) * cells[i, j, m]
    return out.flatten(1)


@pytest.mark.parametrize("seed", range(8))
def test_core_agrees_with_the_formula_on_random_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    heads, dim, levels, points, queries = (int(torch.randint(1, n, (1,), generator=g)) for n in (4, 5, 4, 4, 4))
    shapes = [tuple(torch.randint(1, 6, (2,), generator=g).tolist()) for _ in range(levels)]
    value = torch.randn(1, sum(h * w for h, w in shapes), heads, dim, generator=g)
    locations = torch.rand(1, queries, heads, levels, points, 2, generator=g) * 3 - 1  # many outside
    weights = torch.rand(1, queries, heads, levels, points, generator=g)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights)[0], slow_reading(value, shapes, locations, weights), atol=1e-4, rtol=1e-4)


def test_core_gradients_numerically():
    torch.manual_seed(0)
    shapes = [(3, 4), (2, 2)]
    inputs = (torch.randn(1, 16, 2, 2), torch.rand(1, 2, 2, 2, 2, 2) * 1.4 - 0.2, torch.rand(1, 2, 2, 2, 2))
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda v, l, w: ms_deform_attn(v, shapes, l, w), inputs)


def test_more_frames_than_the_published_kernel_takes():
    torch.manual_seed(0)
    value, locations, weights = torch.randn(67, 12, 1, 2), torch.rand(67, 3, 1, 1, 2, 2), torch.rand(67, 3, 1, 1, 2)
    whole = ms_deform_attn(value, [(3, 4)], locations, weights)
    torch.testing.assert_close(whole[66:], ms_deform_attn(value[66:], [(3, 4)], locations[66:], weights[66:]))


def test_inference_mode_first_does_not_break_training():
    module, shapes = MSDeformAttn(8, 1, 2, 1), [(3, 7)]
    query, value, at = torch.randn(1, 2, 8), torch.randn(1, 21, 8), torch.rand(1, 2, 1, 2)
    with torch.inference_mode():
        module(query, at, value, shapes)
    module(query, at, value, shapes).sum().backward()
    assert module.sampling_offsets.weight.grad is not None


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="expected 12 cells"):
        ms_deform_attn(torch.zeros(1, 11, 1, 2), [(3, 4)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="expected 1 levels"):
        ms_deform_attn(torch.zeros(1, 12, 1, 2), [(3, 4)], torch.zeros(1, 1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, 1))
    for broken in (lambda: MSDeformAttn(10, heads=4), lambda: Attention(10, 4)):
        with pytest.raises(ValueError, match="divisor of 10"):
            broken()
    with pytest.raises(ValueError, match="expected 113 numbers"):
        dynamic_mask_head(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 99), torch.zeros(1, 1, 1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="expected 4 maps"):
        CrossModalFPN(8, 8, 8, 2, 8)([torch.zeros(1, 8, 8, 8)], [], None, torch.zeros(1, 2, 8), None, torch.zeros(1, 2, 8), 1)
    with pytest.raises(ValueError, match="expected 2 maps"):
        DeformableTransformer(8, 2, 1, 1, 8, levels=2)([torch.zeros(1, 8, 4, 4)], [], None, torch.zeros(2, 8), torch.zeros(1, 2, 8))


def test_published_names_and_sizes():
    transformer, fpn, fusion = DeformableTransformer(), CrossModalFPN(), VisionLanguageFusion()
    transformer.decoder.bbox_embed = torch.nn.ModuleList(MLP(256, 256, 4) for _ in range(4))
    shapes = {k: tuple(v.shape) for m in (transformer, fpn, fusion) for k, v in m.state_dict().items()}
    expected = {"level_embed": (4, 256), "reference_points.weight": (2, 256), "decoder.bbox_embed.3.layers.2.weight": (4, 256),
                "encoder.layers.3.self_attn.sampling_offsets.weight": (256, 256), "encoder.layers.0.linear1.weight": (2048, 256),
                "decoder.layers.0.cross_attn.attention_weights.bias": (128,), "decoder.layers.3.self_attn.in_proj_weight": (768, 256),
                "decoder.layers.1.norm3.bias": (256,), "adapter_1.weight": (256, 256, 1, 1), "layer_4.norm.weight": (256,),
                "cross_attn_2.multihead_attn.out_proj.bias": (256,), "cross_attn_1.self_attn.in_proj_bias": (768,),
                "mask_features.weight": (256, 256, 3, 3), "multihead_attn.in_proj_weight": (768, 256)}
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
    levels = [torch.randn(frames, 8, *sizes[0])] + [torch.randn(sentences * frames, 16, *s) for s in sizes[1:]]
    positions, masks = [torch.randn(1, 16, *s) for s in sizes], [torch.zeros(frames, *s, dtype=torch.bool) for s in sizes]
    words, pos = torch.randn(sentences, length, 16), torch.randn(sentences, length, 16)
    word_mask = torch.arange(length).expand(sentences, -1) >= torch.randint(1, length + 1, (sentences, 1))
    with torch.no_grad():
        shared = fpn(levels, positions, masks, words, word_mask, pos, frames)
        copies = fpn([levels[0].repeat(sentences, 1, 1, 1), *levels[1:]], positions, None, words, word_mask, pos, frames)
    torch.testing.assert_close(shared, copies, atol=1e-4, rtol=1e-4)
    assert shared.shape == (sentences * frames, 16, h, w)
