"Propagation: resume, bad input one unit at a time, both directions, real AOT behind the stage."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rvos_nb.core import Problem, write_json
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask, write_mask
from rvos_nb.keyframe import as_json
from rvos_nb.models import zoo
from rvos_nb.propagate import propagate, walk
from rvos_nb.vos.aot import AOT, VARIANTS, AOTPropagator, Propagator


class Shift(Propagator):
    "A step moves the mask one pixel to the right."
    def start(self, size): pass
    def remember(self, frame, labels): self.mask = torch.as_tensor(labels) > 0
    def step(self, frame):
        self.mask = torch.nn.functional.pad(self.mask, (1, 0))[:, :-1]
        return torch.stack([~self.mask, self.mask]).float()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A data set of two videos, five frames each, and a run of true masks with the key frame in the middle."
    root = tmp_path_factory.mktemp('propagate')
    refshapes.write(root/'data', 'valid', 'easy', videos=2, seed=3, frames=5, size=(64, 96))
    data, keys = open_dataset(root/'data', 'valid'), {}
    for v, video in data.videos.items():
        for e in data.expressions[v]:
            for name, mask in zip(video.frames, data.masks(e)): write_mask(root/'run'/'Annotations'/v/e.id/f'{name}.png', mask)
            keys.setdefault(v, {})[e.id] = 2
    write_json(root/'run'/'key_frame.json', as_json(keys))
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path/'r')
    return tmp_path/'r'


def units(root):
    data = open_dataset(root/'data', 'valid')
    return [(v, e.id, data.videos[v].frames) for v in data.videos for e in data.expressions[v]]


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def test_masks_and_key_frames(root):
    report = propagate(root/'data', root/'run', root/'out', Shift())
    assert not report.failed and len(report.done) == len(units(root))
    for v, e, frames in units(root):
        key = read_mask(root/'run'/'Annotations'/v/e/f'{frames[2]}.png')
        if not key.any(): continue
        for t, name in enumerate(frames):
            expected = np.pad(key, ((0, 0), (abs(t - 2), 0)))[:, :96]
            path = root/'out'/'Annotations'/v/e/f'{name}.png'
            assert (read_mask(path) == expected).all() and Image.open(path).mode == 'L'
    assert not [p for p in (root/'out').rglob('*') if p.name.startswith('.')]


def test_one_direction_keeps_the_other_side(root):
    propagate(root/'data', root/'run', root/'out', Shift(), direction='forward')
    for v, e, frames in units(root):
        for t in (0, 1, 2): assert (root/'out'/'Annotations'/v/e/f'{frames[t]}.png').read_bytes() == (root/'run'/'Annotations'/v/e/f'{frames[t]}.png').read_bytes()


def test_resume_gives_the_same_bytes(root):
    whole = propagate(root/'data', root/'run', root/'whole', Shift())
    propagate(root/'data', root/'run', root/'cut', Shift())
    (v, e, frames), (v2, e2, _) = units(root)[0], units(root)[1]
    shutil.rmtree(root/'cut'/'Annotations'/v/e); (root/'cut'/'Annotations'/v2/e2/f'{frames[0]}.png').unlink()
    half = root/'cut'/'Annotations'/v/'.tmp-0123-left'; half.mkdir(); (half/'00000.png').write_bytes(b'half')
    report = propagate(root/'data', root/'run', root/'cut', Shift())
    assert sorted(report.done) == sorted([f'{v}/{e}', f'{v2}/{e2}']) and len(report.skipped) == len(whole.done) - 2
    assert tree(root/'cut') == tree(root/'whole')


def spoil_frame(root, v, e, frames): next((root/'data'/'valid'/'JPEGImages'/v).glob(f'{frames[4]}.*')).unlink()
def spoil_jpeg(root, v, e, frames):
    p = next((root/'data'/'valid'/'JPEGImages'/v).glob(f'{frames[0]}.*')); p.write_bytes(p.read_bytes()[:300])
def spoil_size(root, v, e, frames): write_mask(root/'run'/'Annotations'/v/e/f'{frames[2]}.png', np.ones((64, 95), bool))
def spoil_png(root, v, e, frames): (root/'run'/'Annotations'/v/e/f'{frames[2]}.png').write_bytes(b'\x89PNG\r\n')
def spoil_tree(root, v, e, frames): shutil.rmtree(root/'run'/'Annotations'/v/e)
def spoil_key(root, v, e, frames):
    p = root/'run'/'key_frame.json'; keys = json.loads(p.read_text()); del keys[v][e]; write_json(p, keys)
def spoil_index(root, v, e, frames):
    p = root/'run'/'key_frame.json'; keys = json.loads(p.read_text()); keys[v][e]['index_info']['class_index'] = 5; write_json(p, keys)


@pytest.mark.parametrize('spoil, words', [
    (spoil_frame, 'no such file'), (spoil_jpeg, 'cannot be read'), (spoil_size, '64x95'), (spoil_png, 'cannot be read'),
    (spoil_tree, 'no such folder'), (spoil_key, 'no entry'), (spoil_index, 'key frame 5')])
def test_bad_input_costs_its_own_units(root, spoil, words):
    v, e, frames = units(root)[0]
    spoil(root, v, e, frames)
    report = propagate(root/'data', root/'run', root/'out', Shift())
    mine = {u for u in report.failed if u.startswith(f'{v}/')}
    assert f'{v}/{e}' in report.failed and words in report.failed[f'{v}/{e}'] and set(report.failed) == mine
    assert spoil in (spoil_frame, spoil_jpeg) or len(mine) == 1
    assert len(report.done) == len(units(root)) - len(mine) and not (root/'out'/'Annotations'/v/e).exists()
    assert not [p for p in (root/'out').rglob('*') if p.name.startswith('.')]


def test_empty_key_mask_copies_everything(root):
    v, e, frames = units(root)[0]
    write_mask(root/'run'/'Annotations'/v/e/f'{frames[2]}.png', np.zeros((64, 96), bool))
    propagate(root/'data', root/'run', root/'out', Shift())
    assert tree(root/'out'/'Annotations'/v/e) == tree(root/'run'/'Annotations'/v/e)


def test_unusable_inputs(root):
    with pytest.raises(Problem, match='version'): propagate(root/'data', root/'run', root/'out', Shift(), version='new')
    with pytest.raises(Problem, match='direction'): propagate(root/'data', root/'run', root/'out', Shift(), direction='sideways')
    with pytest.raises(Problem, match='model'): propagate(root/'data', root/'run', root/'out', torch.nn.Linear(2, 2))
    with pytest.raises(Problem, match='no such checkpoint'): propagate(root/'data', root/'run', root/'out', 'no-such-model')
    (root/'run'/'key_frame.json').write_text('[1]')
    with pytest.raises(Problem, match='another form'): propagate(root/'data', root/'run', root/'out', Shift())
    (root/'run'/'key_frame.json').unlink()
    with pytest.raises(Problem, match='key_frame.json'): propagate(root/'data', root/'run', root/'out', Shift())
    propagate_from = root/'empty'; propagate_from.mkdir(); write_json(propagate_from/'key_frame.json', {})
    with pytest.raises(Problem, match='Annotations'): propagate(root/'data', propagate_from, root/'out', Shift())


@pytest.fixture(scope='module')
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AOT(VARIANTS['aot-tiny']).eval()


@pytest.mark.parametrize('version', ['clean', 'challenge'])
def test_a_checkpoint_folder(root, tiny, version):
    zoo.save(tiny, root/'aot', {})
    report = propagate(root/'data', root/'run', root/'out', str(root/'aot'), version=version)
    assert not report.failed and json.loads((root/'out'/'run.json').read_text())['params']['restart'] is (version == 'clean')
    for v, e, frames in units(root): assert sorted(p.stem for p in (root/'out'/'Annotations'/v/e).iterdir()) == sorted(frames)


def test_restart_decides_what_the_way_back_remembers(tiny):
    film = list(refshapes.scene(1, 'easy', frames=7, size=(64, 96)).frames)
    labels = np.zeros((64, 96), np.uint8); labels[20:40, 30:60] = 1
    back = {r: dict(walk(AOTPropagator(tiny, gap=2), film[3:], film[3::-1], 3, labels, restart=r)) for r in (True, False)}
    alone = dict(walk(AOTPropagator(tiny, gap=2), film[3:4], film[3::-1], 3, labels))
    assert all((back[True][t] == alone[t]).all() for t in (2, 1, 0)) and set(back[False]) == {0, 1, 2, 4, 5, 6}


def test_misuse_of_the_protocol(tiny):
    p = AOTPropagator(tiny); frame = np.zeros((64, 96, 3), np.uint8)
    p.start((64, 96))
    with pytest.raises(Problem, match='nothing remembered'): p.step(frame)
    with pytest.raises(Problem, match='labels'): p.remember(frame, np.zeros((64, 95), np.uint8))
    with pytest.raises(Problem, match='frame'): p.remember(frame[:60], np.zeros((64, 96), np.uint8))


@pytest.mark.parametrize('size', [(33, 49), (90, 181), (17, 300)])
def test_any_frame_size(tiny, size):
    rng = np.random.default_rng(0)
    p = AOTPropagator(tiny); p.start(size)
    labels = np.zeros(size, np.uint8); labels[2:9, 4:20] = 7
    p.remember(rng.integers(0, 255, (*size, 3), np.uint8), labels)
    found = p.step(rng.integers(0, 255, (*size, 3), np.uint8))
    assert found.shape == (8, *size) and torch.allclose(found.sum(0), torch.ones(()), atol=1e-4)


def test_mask_token_is_optional_and_the_rest_is_strict(tiny):
    tiny.load_state_dict(tiny.state_dict() | {'LSTT.mask_token': torch.zeros(1, 1, 64)})
    with pytest.raises(RuntimeError, match='missing|Missing'): tiny.load_state_dict({k: v for k, v in tiny.state_dict().items() if 'id_bank' not in k})
