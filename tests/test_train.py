"""Losses against the golden cases, the training loop's resume, and bad recipes."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rvos_nb.core import Problem, StageFailed
from rvos_nb.train import losses

GOLDEN = Path(__file__).parent / 'golden'


def noise(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32))


def criterion_answers(arrays, classes):
    """Everything `matcher_criterion` records for one number of classes, under its names."""
    b, t, q, h, w = 2, 3, 5, 16, 24
    layers = []
    for layer in range(4):
        s = 100 * classes + 10 * layer
        boxes = torch.sigmoid(noise(s + 2, (b, t, q, 4)).double()).float()
        layers.append(dict(pred_logits=noise(s + 1, (b, t, q, classes)), pred_boxes=boxes, pred_masks=2 * noise(s + 3, (b, t, q, h, w))))
    for layer in layers:
        for x in layer.values(): x.requires_grad_()
    target = dict(labels=torch.from_numpy(arrays['in/labels']), boxes=torch.from_numpy(arrays['in/boxes']),
                  valid=torch.from_numpy(arrays['in/valid']).bool(),
                  masks=losses.pad_masks([torch.from_numpy(arrays[f'in/masks_{i}']) for i in range(b)]))
    total, parts, index = losses.Criterion()(layers[-1] | dict(aux_outputs=layers[:-1]), target)
    total.backward()
    yield f'classes{classes}/losses', torch.stack([parts[k] for k in sorted(parts)])
    yield f'classes{classes}/indices', index
    yield f'classes{classes}/total', total
    for i, layer in enumerate(layers):
        for k, x in layer.items(): yield f'classes{classes}/grad/{i}/{k}', x.grad


def unit_answers(arrays):
    x, y = noise(33, (4, 60)), torch.from_numpy(arrays['in/unit/y'])
    boxes = torch.from_numpy(arrays['in/unit/boxes'])
    yield 'unit/focal_loss', losses.focal(x, y).mean(1).sum() / 3
    yield 'unit/dice_loss', (1 - losses.dice(x, y)).sum() / 3
    yield 'unit/focal_coef', losses.focal(x[:, None], y).mean(-1)
    yield 'unit/dice_coef', losses.dice(x[:, None], y)
    yield 'unit/giou', losses.giou(boxes[:3, None], boxes[3:])


@pytest.mark.parametrize('part', ['classes1', 'classes65', 'unit'])
def test_matcher_criterion(part):
    arrays = np.load(GOLDEN / 'referformer' / 'matcher_criterion.npz', allow_pickle=False)
    meta = json.loads(str(arrays['meta']))
    answers = dict(unit_answers(arrays) if part == 'unit' else criterion_answers(arrays, int(part[7:])))
    expected = {k[4:] for k in arrays.files if k.startswith(f'out/{part}/')}
    assert set(answers) == expected
    for name, got in answers.items():
        how = meta['outputs'].get(name, {})
        got = got.detach().numpy()[tuple(slice(None, None, s) for s in how.get('stride', []))]
        np.testing.assert_allclose(got, arrays[f'out/{name}'], how.get('rtol', 2e-3), how.get('atol', 2e-3 if 'indices' not in name else 0), err_msg=name)
        if part != 'unit' and 'losses' in name: np.testing.assert_allclose(got, arrays[f'out/{name}'], 1e-5)


def test_propagation_formulas():
    arrays = np.load(GOLDEN / 'vos' / 'train_loss_aotl.npz', allow_pickle=False)
    logits, labels = torch.from_numpy(arrays['in/loss_logits']), torch.from_numpy(arrays['in/loss_labels'])
    for step in (0, 25000, 50000, 90000):
        got = losses.bootstrapped_ce(logits, labels, losses.hard_share(step / 100000))
        np.testing.assert_allclose(got, arrays[f'out/ce_step{step}'], 1e-5, err_msg=str(step))
    np.testing.assert_allclose(losses.soft_jaccard(logits, labels), arrays['out/soft_jaccard'], 1e-5)
    for step in (0, 25000, 75000):      # the recorded total is made of the recorded frames
        each = arrays[f'out/step{step}/frame_losses']
        total = losses.aux_weight(step / 100000) * each[0].mean() + each[1:].mean()
        np.testing.assert_allclose(total, arrays[f'out/step{step}/loss'], 1e-5)


TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
NARROW = dict(backbone='conv_tiny', num_feature_levels=3, enc_layers=1, dec_layers=2, hidden_dim=16, dim_feedforward=16, nheads=2, enc_n_points=1, dec_n_points=1,
              mask_dim=8, fusion_heads=2, proj_groups=2, fpn_groups=2, short_side=32, text=TEXT)
REFER = dict(name='toy', family='referformer', model=NARROW, tuning=dict(ema=0.5), watch=dict(every=50, clips=8, frames=2, size=[32, 48], levels=['medium']),
             stages=[dict(steps=3, clips=2, sentences=2, size=[32, 48]), dict(steps=2, frames=2, clips=2, size=[32, 48], levels={'medium': 1})])
AOT = dict(name='toy-aot', family='aot', model=dict(encoder='conv_tiny_vos', dim=32, heads=2, reach=2, max_objects=5, align_corners=False, id_kernel=16, drop_path=0.1),
           watch=dict(every=50, clips=8, frames=3, size=[32, 48], levels=['easy']), stages=[dict(steps=4, frames=3, clips=2, size=[32, 48], levels={'hard': 1})])


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('recipe', [REFER, AOT], ids=['referformer', 'aot'])
def test_resume_equals_undisturbed(recipe, tmp_path):
    from rvos_nb.models import zoo
    from rvos_nb.train.loop import train
    train(recipe, tmp_path / 'a').check()
    torch.rand(7)                                           # the state of the global generator must not matter
    assert train(recipe, tmp_path / 'b', minutes=0).check().done
    assert zoo.card(tmp_path / 'b' / 'model')['card']['steps'] == 1
    assert train(recipe, tmp_path / 'b').check().done and train(recipe, tmp_path / 'b').check().skipped
    assert (tmp_path / 'a' / 'model' / 'model.safetensors').read_bytes() == (tmp_path / 'b' / 'model' / 'model.safetensors').read_bytes()
    assert (tmp_path / 'a' / 'run.json').read_bytes() == (tmp_path / 'b' / 'run.json').read_bytes()
    card = zoo.card(tmp_path / 'a' / 'model')['card']
    assert card['steps'] == card['of_steps'] and card['hardware'] and card['quick_validation']


def test_workers_change_nothing():
    from rvos_nb.data.clips import Draw, Stream
    from rvos_nb.train.loop import batches_from
    stream = Stream('refer', 3, [Draw(3, clips=2, size=(32, 48)), Draw(2, frames=2, clips=1, size=(32, 48))])
    here, there = list(batches_from(stream, 1)), list(batches_from(stream, 1, workers=1))
    assert len(here) == len(there) == 4
    for a, b in zip(here, there):
        assert a.texts == b.texts and (a.frames == b.frames).all() and (a.masks == b.masks).all()


def test_damaged_or_foreign_checkpoint(tmp_path):
    from rvos_nb.train.loop import Trainer, read_recipe, train
    train(AOT, tmp_path, minutes=0).check()
    other = Trainer(read_recipe(AOT | dict(seed=9)), 'cpu')
    with pytest.raises(Problem, match='another recipe'): other.load(tmp_path / 'checkpoint.pt')
    with pytest.raises(Problem, match='other parameters'): train(AOT | dict(seed=9), tmp_path)
    (tmp_path / 'checkpoint.pt').write_bytes((tmp_path / 'checkpoint.pt').read_bytes()[:1000])
    report = train(AOT, tmp_path)
    assert 'does not load' in report.failed['toy-aot']
    assert train(AOT, tmp_path, resume=False).check().done


def test_loss_that_explodes_is_named(tmp_path):
    from rvos_nb.train.loop import Trainer, batches_from, read_recipe
    from rvos_nb.data.clips import Stream
    trainer = Trainer(read_recipe(AOT), 'cpu')
    with torch.no_grad(): next(trainer.task.model.parameters()).fill_(float('nan'))
    with pytest.raises(Problem, match='finite'): trainer.one_step(next(batches_from(Stream('sequence', 0, trainer.recipe.stages), 0)))


@pytest.mark.parametrize('change, said', [
    (dict(family='dog'), "family 'dog'"), (dict(learning_rate=1), 'learning_rate'), (dict(tuning=dict(momentum=1)), 'momentum'),
    (dict(loss=dict(size=1)), 'size'), (dict(model=dict(width=1)), 'width'), (dict(stages=[]), 'at least one stage'), (dict(stages=[dict(clips=1)]), 'steps'),
    (dict(stages=[dict(steps=1, size=[30, 48])]), 'size'), (dict(stages=[dict(steps=1, levels={'odd': 1})]), 'levels'), (dict(stages=[dict(steps=1, kinds=['smell'])]), 'smell'),
    (dict(watch=3), 'watch'), (dict(tuning=None), 'tuning'), (dict(tuning=dict(lr='1e-3')), 'with a dot')])
def test_bad_recipe(change, said, tmp_path):
    from rvos_nb.train.loop import train
    with pytest.raises((Problem, StageFailed), match=said) as e: train(REFER | change, tmp_path).check()
    assert all(word in str(e.value) for word in ('found', 'expected'))


def test_bad_recipe_file(tmp_path):
    from rvos_nb.train.loop import read_recipe
    (tmp_path / 'x.yaml').write_text('name: [')
    for recipe, said in ((tmp_path / 'x.yaml', 'not YAML'), (tmp_path / 'none.yaml', 'no such recipe'), ('nothing', 'no such recipe')):
        with pytest.raises(Problem, match=said): read_recipe(recipe)


@pytest.mark.parametrize('name', ['train-referformer-tiny', 'train-aot-tiny'])
def test_shipped_recipes_build(name):
    from rvos_nb.train.loop import Trainer, read_recipe
    trainer = Trainer(read_recipe(name), 'cpu')
    assert 3e5 < sum(p.numel() for p in trainer.task.model.parameters()) < 2e6
