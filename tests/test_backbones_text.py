"""Parity of backbones and text encoder with published answers, stage by stage, and what they do with odd input."""
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RobertaModel

from rvos_nb.core import Problem
from rvos_nb.models.backbones import build_backbone, fold_time, resize_mask, sine_position_2d
from rvos_nb.models.text import (ROBERTA_BASE, FeatureResizer, TextEncoder, make_tokenizer, normalise, small_config, sine_position_1d,
                                 tokenizer_from)
from rvos_nb.models.video_swin import VideoSwin, fit_window, seams
from rvos_nb.verify.cases import compare, image, load_case, load_filled, published_tensors

GOLDEN = Path(__file__).parent/'golden'/'referformer'


@contextmanager
def without_init():
    "The case brings every number, so drawing fresh ones is a waste."
    names = ('normal_', 'trunc_normal_', 'kaiming_uniform_', 'kaiming_normal_', 'uniform_')
    kept = {n: getattr(torch.nn.init, n) for n in names}
    for n in names: setattr(torch.nn.init, n, lambda t, *a, **k: t)
    try: yield
    finally:
        for n, f in kept.items(): setattr(torch.nn.init, n, f)


def clip_of(case):
    "The padded batch (B, T, 3, H, W) of a case and its mask (B, T, H, W), True = padding."
    videos, step = case.meta['inputs']['videos'], case.meta['inputs']['size_divisibility']
    height, width = (-(-max(v['size'][i] for v in videos) // step) * step for i in (0, 1))
    x, mask = torch.zeros(len(videos), videos[0]['shape'][0], 3, height, width), torch.ones(len(videos), videos[0]['shape'][0], height, width, dtype=torch.bool)
    for b, v in enumerate(videos):
        h, w = v['size']
        x[b, :, :, :h, :w], mask[b, :, :h, :w] = torch.from_numpy(image(v['image_seed'], tuple(v['shape']))), False
    return x, mask


def part(case, names):
    "The case with only the answers whose name begins with one of `names`."
    return replace(case, answers={k: v for k, v in case.answers.items() if k.startswith(names)})


@pytest.mark.parametrize('name', ['resnet50', 'resnet50_batch', 'video_swin_t', 'video_swin_b'])
def test_backbone_equals_published(name):
    case = load_case(GOLDEN/f'{name}.npz')
    with without_init(): net = build_backbone(case.meta['config']['backbone']).eval()
    load_filled(net, case.meta, case.arrays, prefix='backbone.0.body.')
    assert sorted(net.state_dict()) == sorted(k[0][16:] for k in case.meta['keys'] if k[0].startswith('backbone.'))
    x, mask = clip_of(case)
    with torch.inference_mode(): levels = net(x)
    assert [l.shape[1] for l in levels] == net.channels
    outputs = [(f'backbone/{i}', l.numpy()) for i, l in enumerate(levels)]
    outputs += [(f'backbone_mask/{i}', resize_mask(mask, l.shape[-2:]).flatten(0, 1).numpy()) for i, l in enumerate(levels)]
    verdict = compare(part(case, ('backbone/', 'backbone_mask/')), outputs)
    print(verdict)
    assert verdict.ok and verdict.count == 8, str(verdict)
    assert verdict.worst < 0.05, str(verdict)   # far inside, so that a slow drift shows


def test_text_encoder_equals_published():
    case = load_case(GOLDEN/'text_encoder.npz')
    with without_init(): encoder, resizer = TextEncoder(case.meta['config']).eval(), FeatureResizer(768, 256).eval()
    state = {k: torch.from_numpy(v) for k, v in published_tensors(case.meta, case.arrays)}
    state['text_encoder.embeddings.position_ids'] = torch.arange(514)[None]          # files of that era keep it
    encoder.load_state_dict({k[13:]: v for k, v in state.items() if k.startswith('text_encoder.')}, strict=True)
    resizer.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith('resizer.')}, strict=True)
    ids, mask = torch.from_numpy(case.arrays['in/input_ids']), torch.from_numpy(case.arrays['in/attention_mask']) == 0
    with torch.inference_mode():
        words, sentence = encoder(ids, mask)
        hidden = RobertaModel.forward(encoder, ids, attention_mask=(~mask).long(), output_hidden_states=True).hidden_states
        outputs = dict(embeddings=hidden[0], layer1=hidden[1], layer3=hidden[3], layer6=hidden[6], last_hidden_state=words, pooler_output=sentence,
                       words=resizer(words), sentence=resizer(sentence), position_1d=sine_position_1d(mask, 256),
                       position_2d=sine_position_2d(torch.from_numpy(case.arrays['in/mask2d']), 256))
    verdict = compare(case, [(k, v.numpy()) for k, v in outputs.items()])
    print(verdict)
    assert verdict.ok and verdict.count == 10, str(verdict)
    assert {k: case.meta['config'][k] for k in ROBERTA_BASE} == ROBERTA_BASE


@pytest.mark.parametrize('variant,millions', [('small', 49_502_934), ('base', 87_630_792)])
def test_video_swin_sizes(variant, millions):
    with torch.device('meta'): net = VideoSwin(variant)
    assert sum(p.numel() for p in net.parameters()) == millions


def test_video_swin_loads_with_and_without_index_and_trains():
    torch.manual_seed(0)
    net = VideoSwin('tiny', drop=0.)
    state = net.state_dict()
    net.load_state_dict({k: v for k, v in state.items() if not k.endswith('index')}, strict=True)
    with pytest.raises(RuntimeError): net.load_state_dict({k: v for k, v in state.items() if 'norm1' not in k}, strict=True)
    x, grads = torch.randn(1, 9, 3, 64, 64), []
    seams.cache_clear()
    with torch.inference_mode(): net(x)                                 # what it keeps must serve training too
    for net.checkpointing in (False, True):
        net.zero_grad()
        sum(l.square().mean() for l in net.train()(x)).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(g.isfinite().all() for g in grads[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads))


def test_seams_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = tuple(int(v) for v in rng.integers(1, 25, 3))
        window, shift = fit_window(size, bool(rng.integers(2)))
        grid = tuple(-(-s // k) for s, k in zip(size, window))
        label = np.zeros(tuple(g * k for g, k in zip(grid, window)), int)           # the published way: number the regions
        cuts = [[(0, -k), (-k, -m), (-m, None)] if m else [(0, None)] for k, m in zip(window, shift)]
        for n, (a, b, c) in enumerate((a, b, c) for a in cuts[0] for b in cuts[1] for c in cuts[2]): label[slice(*a), slice(*b), slice(*c)] = n
        t, h, w = window
        tokens = label.reshape(grid[0], t, grid[1], h, grid[2], w).transpose(0, 2, 4, 1, 3, 5).reshape(-1, t * h * w)
        seen = set()
        for where, mask in seams(grid, window, shift, torch.device('cpu')):
            for i in where.tolist():
                same = tokens[i][:, None] == tokens[i][None]
                assert (same == (True if mask is None else mask.numpy())).all() and i not in seen
                seen.add(i)
        assert len(seen) == len(tokens)


@pytest.mark.parametrize('name', ['conv_tiny', 'video_swin_t_p4w7'])
@pytest.mark.parametrize('size', [(1, 33, 47), (3, 32, 32), (9, 40, 36)])
def test_odd_sizes_and_independent_clips(name, size):
    torch.manual_seed(0)
    net, (t, h, w) = build_backbone(name).eval(), size
    x = torch.randn(2, t, 3, h, w)
    with torch.inference_mode(): both, first = net(x), net(x[:1])
    for level, alone, stride in zip(both, first, net.strides):
        assert level.shape[0] == 2 * t and level.shape[-2:] == (-(-h // stride), -(-w // stride))
        assert torch.allclose(level[:t], alone, atol=1e-5)


def test_conv_tiny_can_be_saved():
    net = build_backbone('conv_tiny')
    assert all(p.is_contiguous() for p in net.parameters())          # safetensors refuses others


@pytest.mark.parametrize('call,said', [
    (lambda: fold_time(torch.zeros(3, 64, 64)), '(B, T, 3, H, W)'),
    (lambda: build_backbone('resnet18'), 'resnet50'),
    (lambda: build_backbone('conv_tiny', depth=3), 'depth'),
    (lambda: build_backbone('conv_tiny', time_strides=(6,)), 'time_strides'),
    (lambda: VideoSwin('huge'), 'tiny'),
    (lambda: sine_position_2d(torch.zeros(1, 2, 2, dtype=torch.bool), 6), 'multiple of 4'),
    (lambda: normalise('  '), 'at least one word'),
    (lambda: tokenizer_from('/nonexistent'), 'no tokenizer'),
    (lambda: TextEncoder(small_config(8)).encode(['a']), 'no tokenizer'),
])
def test_bad_input_is_one_clear_line(call, said):
    with pytest.raises(Problem) as e: call()
    assert said in str(e.value) and '\n' not in str(e.value)


def test_tokenizer_of_another_family_is_refused(tmp_path):
    import json
    make_tokenizer(['red']).save_pretrained(tmp_path)
    held = json.loads((tmp_path/'tokenizer.json').read_text())
    held['model']['vocab'] |= {'<pad>': 0, '<s>': 1}
    for t in held['added_tokens']: t['id'] = held['model']['vocab'][t['content']]
    (tmp_path/'tokenizer.json').write_text(json.dumps(held))
    with pytest.raises(Problem) as e: tokenizer_from(tmp_path)
    assert '0, 1, 2' in str(e.value)


def test_tokenizer_fuzz(tmp_path):
    rng = np.random.default_rng(1)
    words = ['red', 'ball', 'left', "zebra's", 'größer', '<s>', '</s>', '<pad>', '球', '🎈', '...', '-', 'a' * 300]
    tokenizer = make_tokenizer(words[:4])
    encoder = TextEncoder(small_config(len(tokenizer), hidden=16, layers=1, heads=2), tokenizer).eval()
    for _ in range(30):
        text = ' '.join(rng.choice(words, rng.integers(1, 9)))
        with torch.inference_mode(): w, mask, s = encoder.encode([text, 'red ball'])
        assert w.isfinite().all() and s.isfinite().all() and w.shape[:2] == mask.shape
