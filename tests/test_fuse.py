"Fusion: the golden rounds, the rule written out, what members may lack, and runs that were killed."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from rvos_nb.core import Problem, read_json, write_json
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask, write_mask, write_tree
from rvos_nb.fuse import HALF, foreground, fuse, fuse_video, mean, tally, vote
from rvos_nb.keyframe import as_json, choose, from_json
from rvos_nb.predict import save_candidates
from rvos_nb.verify.cases import compare, load_case
from rvos_nb.verify.pipeline import fusion_round1, fusion_round2

GOLDEN = Path(__file__).parent/'golden/pipeline'


@pytest.mark.parametrize('name, run, count', [('fusion_round1', fusion_round1, 53), ('fusion_round2', fusion_round2, 16)])
def test_golden(name, run, count):
    case = load_case(GOLDEN/f'{name}.npz')
    verdict = compare(case, run(case.meta, case.arrays))
    assert verdict.ok and verdict.worst == 0 and verdict.count == count, verdict


@pytest.mark.parametrize('seed', range(20))
def test_rule_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    members, pair, weights = int(rng.integers(1, 6)), ['a', 'b'], rng.integers(1, 5, 5) / 2
    p = {(m, e): rng.random((2, 3, 4), np.float32) for m in range(members) for e in ['a', 'b', 'c']}
    w = None if seed % 2 else weights[:members].tolist()
    weight = lambda m: 1 if w is None else w[m]
    hard = dict(fuse_video_result(p, members, w))
    votes = sum(weight(m) * (p[m, e] > .5) for m in range(members) for e in pair)
    assert (hard['a'] == (votes >= sum(map(weight, range(members))))).all()
    votes = sum(weight(m) * (p[m, 'c'] > .5) for m in range(members))
    assert (hard['c'] == (votes > sum(map(weight, range(members))) / 2)).all()
    soft = dict((g[0], x) for g, x in fuse_video(lambda m, e: p[m, e], [pair, ['c']], members, w, mode='mean'))
    want = sum(weight(m) * p[m, 'c'].astype(float) for m in range(members)) / sum(map(weight, range(members)))
    assert ((soft['c'] == (want > .5)) | (abs(want - .5) < 1e-6)).all()


def fuse_video_result(p, members, w):
    for g, x in fuse_video(lambda m, e: foreground(p[m, e], 'probability'), [['a', 'b'], ['c']], members, w): yield g[0], x


def test_the_edge_of_the_sigmoid():
    assert not foreground(np.float32([0, HALF]), 'logit').any() and foreground(np.nextafter(HALF, np.float32(1)), 'logit')
    assert not foreground(np.float32([.5, 0]), 'probability').any()
    assert foreground(np.uint8([0, 1, 254]), 'mask').tolist() == [False, True, True]
    with pytest.raises(Problem, match='kind'): foreground(np.zeros(1), 'odds')


def test_many_opinions_do_not_wrap_around():
    one = np.ones((1, 2, 2), bool)
    assert (tally(one for _ in range(300))[0] == 300).all() and vote([one] * 300, threshold=300).all()
    assert vote([one, ~one], [.1, .1]).all() and not vote([one, ~one], [.1, .1], strict=True).any()


def test_empty_and_misfitting_opinions():
    for combine in (vote, mean):
        with pytest.raises(Problem, match='none'): combine([])
        with pytest.raises(Problem, match='shape'): combine([np.ones((1, 2, 2), np.float32) > 0, np.ones((1, 2, 3), np.float32) > 0])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A small data set and two members that differ by a shift."
    root = tmp_path_factory.mktemp('fuse')
    refshapes.write(root/'data', 'valid', 'easy', videos=3, seed=3, frames=3, size=(64, 96))
    data = open_dataset(root/'data')
    for m, shift in (('m0', 0), ('m1', 3)):
        for v, es in data.expressions.items():
            for e in es:
                (root/m/'Annotations'/v/e.id).mkdir(parents=True)
                write_tree(root/m/'Annotations'/v/e.id, data.videos[v].frames, np.roll(data.masks(e), shift, 2))
    write_json(root/'m0'/'key_frame.json', as_json({v: {e.id: i % 3 for i, e in enumerate(es)} for v, es in data.expressions.items()}))
    return root, data


@pytest.fixture
def copy(made, tmp_path):
    for m in ('m0', 'm1', 'data'): shutil.copytree(made[0]/m, tmp_path/m)
    return tmp_path, made[1]


def masks(run, data, v, e): return np.stack([read_mask(run/'Annotations'/v/e/f'{f}.png') for f in data.videos[v].frames])


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_stage(copy):
    tmp, data = copy
    report = fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out', groups='objects').check()
    v = list(data.videos)[0]; e = data.expressions[v][0].id
    assert (masks(tmp/'out', data, v, e) == masks(tmp/'m0', data, v, e) | masks(tmp/'m1', data, v, e)).all()  # half of the votes, ties count
    assert len(report.done) == 3 and from_json(read_json(tmp/'out/key_frame.json')) == from_json(read_json(tmp/'m0/key_frame.json'))
    before = files(tmp/'out')
    assert len(fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out', groups='objects').skipped) == 3 and files(tmp/'out') == before


def test_trees_without_a_run_and_members_without_masks(copy):
    "A published tree has no Annotations level; a member may have candidates only."
    tmp, data = copy
    (tmp/'m1/Annotations').rename(tmp/'Annotations_AOT_class_index'); soft = tmp/'soft'
    for v, es in data.expressions.items():
        for e in es:
            x = np.where(data.masks(e), 5, -5).astype(np.float32)
            save_candidates(soft/'candidates'/v/f'{e.id}.safetensors', x, np.arange(3.), np.zeros((3, 4)), dict(kind='logit', size=[64, 96], model='toy', frames=list(data.videos[v].frames)))
    assert set(k for es in from_json(choose(soft)).values() for k in es.values()) == {2}
    for mode in ('vote', 'mean'):
        fuse(tmp/'data', [soft, tmp/'Annotations_AOT_class_index', tmp/'m0'], tmp/mode, mode=mode, groups='none').check()
        for e in data: assert (masks(tmp/mode, data, e.video, e.id) == data.masks(e)).all()
    assert from_json(read_json(tmp/'vote/key_frame.json'))


@pytest.mark.parametrize('spoil, words', [
    (lambda folder: shutil.rmtree(folder), 'no masks of this member'),
    (lambda folder: sorted(folder.glob('*.png'))[1].unlink(), 'no such file'),
    (lambda folder: write_mask(sorted(folder.glob('*.png'))[1], np.ones((64, 95), bool)), '64x95'),
    (lambda folder: sorted(folder.glob('*.png'))[1].write_bytes(b'\x89PNG\r\n\x1a\n'), 'cannot be read')])
def test_a_member_with_a_hole_costs_one_video(copy, spoil, words):
    tmp, data = copy
    v = list(data.videos)[1]; hurt = tmp/'m1/Annotations'/v/data.expressions[v][-1].id
    spoil(hurt)
    report = fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out')
    assert list(report.failed) == [v] and words in report.failed[v] and str(hurt) in report.failed[v] and len(report.done) == 2
    assert not (tmp/'out/Annotations'/v).exists() and not [p for p in tmp.rglob('.tmp-*')]
    shutil.rmtree(hurt, ignore_errors=True); shutil.copytree(tmp/'m0/Annotations'/v/hurt.name, hurt)
    assert fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out').check().done == [v]


@pytest.mark.parametrize('wrong', [dict(member_dirs=[]), dict(member_dirs=['m0', 'none']), dict(weights=[1]), dict(weights=[0, 0]), dict(weights=[1, -1]), dict(mode='max'),
                                   dict(groups='triples'), dict(leftover='last'), dict(key_frame_member=2), dict(threshold=-1), dict(out_dir='m0')])
def test_wrong_parameters(made, tmp_path, wrong):
    given = dict(member_dirs=['m0', 'm1'], out_dir=tmp_path/'out') | wrong
    given['member_dirs'] = [made[0]/m for m in given['member_dirs']]
    if given['out_dir'] == 'm0': given['out_dir'] = made[0]/'m0'
    with pytest.raises(Problem) as e: fuse(made[0]/'data', **given)
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


def test_an_empty_sentence_keeps_its_place_in_the_pairs(copy):
    tmp, data = copy
    path = tmp/'data/meta_expressions/valid/meta_expressions.json'; listing = read_json(path)
    v = list(data.videos)[0]; listing['videos'][v]['expressions']['1']['exp'] = ' '; write_json(path, listing)
    report = fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out')
    assert list(report.failed) == [f'{v}/1'] and not (tmp/'out/Annotations'/v/'1').exists()
    both = lambda e: masks(tmp/'m0', data, v, e) & masks(tmp/'m1', data, v, e)
    assert (masks(tmp/'out', data, v, '0') == both('0')).all()                                         # alone now: a strict majority of two
    assert (masks(tmp/'out', data, v, '2') == masks(tmp/'out', data, v, '3')).all()                    # 2 and 3 are still a pair


def test_sentences_of_mevis_are_not_pooled(tmp_path):
    refshapes.write(tmp_path/'data', 'valid_u', 'easy', videos=1, seed=1, layout='mevis')
    for i in range(2): (tmp_path/f'm{i}'/'Annotations').mkdir(parents=True)
    with pytest.raises(Problem, match='MeViS'): fuse(tmp_path/'data', [tmp_path/'m0', tmp_path/'m1'], tmp_path/'out', split='valid_u')


def test_objects_need_ids(copy):
    tmp, data = copy
    path = tmp/'data/meta_expressions/valid/meta_expressions.json'; listing = read_json(path)
    for v in listing['videos'].values():
        for e in v['expressions'].values(): e.pop('obj_id', None)
    write_json(path, listing)
    report = fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'out', groups='objects')
    assert len(report.failed) == 3 and all('no object id' in why for why in report.failed.values())


SLOW = '''
import sys, time
from pathlib import Path
import rvos_nb.fuse as f
write = f.write_tree
def slowly(*a): time.sleep(.05); write(*a); print('.', flush=True)
f.write_tree = slowly
tmp = Path(sys.argv[1]); f.fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'killed')
'''


def test_killed_and_run_again(copy):
    tmp, data = copy
    fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'whole').check()
    child = subprocess.Popen([sys.executable, '-c', SLOW, tmp], stdout=subprocess.PIPE, env=dict(os.environ, IN_TEST='1'))
    for _ in range(len(data.expressions[list(data.videos)[0]]) + 2): child.stdout.readline()  # into the second video
    child.send_signal(signal.SIGKILL); child.wait()
    assert list((tmp/'killed').rglob('.tmp-*')) and not (tmp/'killed/key_frame.json').exists()
    report = fuse(tmp/'data', [tmp/'m0', tmp/'m1'], tmp/'killed').check()
    assert report.skipped and report.done and files(tmp/'killed') == files(tmp/'whole')


def test_no_torch():
    code = "import sys, rvos_nb.fuse, rvos_nb.metrics, rvos_nb.evaluate, rvos_nb.explore, rvos_nb.keyframe, rvos_nb.verify.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
