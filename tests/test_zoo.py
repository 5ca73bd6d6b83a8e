"""Checkpoints that are wrong in every way we could think of: each is refused with one line that names the fault."""
import json
import shutil

import pytest
import safetensors.torch
import torch

from rvos_nb.core import Problem
from rvos_nb.models import zoo
from rvos_nb.models.referformer import ReferFormer, tiny_config
from rvos_nb.models.text import make_tokenizer


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(['the red circle on the left', 'a small blue square'])
    model = ReferFormer(tiny_config(len(tokenizer)), tokenizer).eval()
    folder = tmp_path_factory.mktemp('zoo')/'tiny'
    zoo.save(model, folder, {'steps': 0})
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path/'tiny')
    return tmp_path/'tiny'


def refused(folder, *words, **options):
    with pytest.raises(Problem) as e: zoo.load(folder, **options)
    said = str(e.value)
    assert '\n' not in said and all(w in said for w in words), said


def change(folder, edit):
    tensors = safetensors.torch.load_file(folder/'model.safetensors')
    edit(tensors)
    safetensors.torch.save_file(tensors, folder/'model.safetensors')


def test_round_trip(saved):
    model, folder = saved
    again = zoo.load(folder, family='referformer')
    assert not again.training and again.config == model.config
    assert {p.name for p in folder.iterdir()} == {'config.json', 'model.safetensors', 'tokenizer'}
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    frames = torch.randint(0, 256, (3, 64, 96, 3), dtype=torch.uint8)
    a, b = (m.refer(m.see(frames), ['the red circle', 'a small blue square']) for m in (model, again))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.scores, b.scores) and a.size == (64, 96)


def test_same_bytes(saved, tmp_path):
    zoo.save(saved[0], tmp_path/'again', {'steps': 0})
    for name in ('config.json', 'model.safetensors'): assert (tmp_path/'again'/name).read_bytes() == (saved[1]/name).read_bytes()


def test_box_heads_are_stored_once(saved):
    stored = safetensors.torch.load_file(saved[1]/'model.safetensors')
    assert 'bbox_embed.0.layers.0.weight' in stored and not any(n.startswith('transformer.decoder.bbox_embed') for n in stored)


def test_missing(copy):
    change(copy, lambda t: t.pop('query_embed.weight'))
    refused(copy, '1 missing (query_embed.weight)', 'model.safetensors')


def test_left_over(copy):
    change(copy, lambda t: t.update({'criterion.empty_weight': torch.ones(2)}))
    refused(copy, '1 left over (criterion.empty_weight)')


def test_other_shape(copy):
    change(copy, lambda t: t.update({'query_embed.weight': torch.ones(7, 64)}))
    refused(copy, '1 of another shape', '(7, 64) for (5, 64)')


def test_other_configuration(copy):
    said = json.loads((copy/'config.json').read_text())
    said['config']['dec_layers'] = 3
    (copy/'config.json').write_text(json.dumps(said))
    refused(copy, '30 missing', 'transformer.decoder.layers.2')


@pytest.mark.parametrize('cut', [0, 7, 1000, -1])
def test_truncated_weights(copy, cut):
    data = (copy/'model.safetensors').read_bytes()
    (copy/'model.safetensors').write_bytes(data[:cut])
    refused(copy, 'model.safetensors', 'damaged')


def test_weights_are_not_a_pickle(copy):
    torch.save({'query_embed.weight': torch.ones(1)}, copy/'model.safetensors')
    refused(copy, 'damaged')


def test_no_weights(copy):
    (copy/'model.safetensors').unlink()
    refused(copy, 'model.safetensors', 'no such file')


def test_no_tokenizer(copy):
    shutil.rmtree(copy/'tokenizer')
    refused(copy, 'tokenizer')


def test_damaged_tokenizer(copy):
    for p in (copy/'tokenizer').iterdir(): p.write_text('{"cut')
    refused(copy, 'tokenizer')


@pytest.mark.parametrize('text', ['{"family": "referf', '[]', '{"card": {}}'])
def test_damaged_config(copy, text):
    (copy/'config.json').write_text(text)
    refused(copy, 'config.json')


def test_unknown_setting(copy):
    said = json.loads((copy/'config.json').read_text())
    said['config']['hiden_dim'] = 64
    (copy/'config.json').write_text(json.dumps(said))
    refused(copy, 'config.json', 'hiden_dim')


def test_unknown_family(copy):
    said = json.loads((copy/'config.json').read_text()) | {'family': 'later'}
    (copy/'config.json').write_text(json.dumps(said))
    refused(copy, "'later'", 'referformer')


def test_another_family(copy): refused(copy, "family 'referformer'", "family 'aot'", family='aot')


def test_no_such_name(tmp_path):
    refused('no-such-model', 'no such checkpoint')
    refused(tmp_path, 'without config.json')


def test_too_long_a_sentence(saved):
    model = saved[0]
    with pytest.raises(Problem, match='tokens'): model.refer(model.see(torch.zeros(1, 64, 96, 3, dtype=torch.uint8)), ['red ' * 60])


@pytest.mark.parametrize('size,frames', [((96, 144), 5), ((33, 47), 1), ((200, 90), 2), ((20, 300), 3)])
def test_any_size_is_answered(saved, size, frames):
    model = saved[0]
    found = model.refer(model.see(torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8)), ['the red circle'])
    assert found.masks(0).shape == (frames, *size) and found.scores.shape == (1, frames) and found.logits.isfinite().all()


def test_sentences_in_small_batches(saved, monkeypatch):
    from rvos_nb.models import referformer
    model, texts = saved[0], ['the red circle', 'a small blue square on the left', 'square']
    seen = model.see(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))
    whole = model.refer(seen, texts)
    monkeypatch.setattr(referformer, 'PIXELS', 1)
    single = model.refer(seen, texts)
    assert torch.allclose(whole.logits, single.logits, rtol=1e-4, atol=1e-4 * whole.logits.abs().max().item())
    assert torch.allclose(whole.scores, single.scores, atol=1e-5)


def test_resnet_has_the_published_tensors():
    from rvos_nb.models.referformer import ReferFormerConfig
    with torch.device('meta'): model = ReferFormer(ReferFormerConfig())
    assert sum(p.numel() for p in model.parameters()) == 176_262_207
