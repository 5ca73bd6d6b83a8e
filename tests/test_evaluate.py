"Key frames, evaluation, the submission zip and the report: scores that are known beforehand, and input that is wrong."
import json, shutil, zipfile
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from rvos_nb.core import Problem, StageFailed, read_json, write_json
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_mask, write_mask, write_tree
from rvos_nb.data.video import open_clip
from rvos_nb.evaluate import MEASURES, NoTruth, evaluate, submission
from rvos_nb.explore import overlays, report
from rvos_nb.keyframe import choose, from_json
from rvos_nb.predict import save_candidates


@pytest.fixture
def made(tmp_path):
    refshapes.write(tmp_path/'data', 'valid', 'all', videos=2, seed=4, frames=3, size=(64, 96))
    data = open_dataset(tmp_path/'data')
    for e in data:
        folder = tmp_path/'run/Annotations'/e.video/e.id; folder.mkdir(parents=True)
        write_tree(folder, data.videos[e.video].frames, data.masks(e))
    return tmp_path, data


def test_truth_scores_100_and_tables_agree(made):
    tmp, data = made
    result = evaluate(tmp/'data', tmp/'run', tmp/'scores')
    assert result['J&F'] == result['J'] == result['F'] == result['J_recall'] == result['objects']['J&F'] == 100 and result['J_decay'] == 0
    assert result['expressions'] == len(data) and not result['missing'] and not result['unscored']
    assert result == read_json(tmp/'scores/scores.json') and (tmp/'scores/expressions.csv').read_text().count('\n') == len(data) + 1
    assert {p.name for p in (tmp/'scores').iterdir()} == {'scores.json', 'expressions.csv', 'objects.csv', 'kinds.csv', 'videos.csv'}
    before = {p.name: p.read_bytes() for p in (tmp/'scores').iterdir()}
    evaluate(tmp/'data', tmp/'run'/'Annotations', tmp/'scores')
    assert before == {p.name: p.read_bytes() for p in (tmp/'scores').iterdir()}


def test_missing_and_broken_masks_score_zero_and_are_named(made):
    tmp, data = made
    first, second, third = list(data)[:3]
    where = lambda e, i: tmp/'run/Annotations'/e.video/e.id/f'{data.videos[e.video].frames[i]}.png'
    shutil.rmtree(where(first, 0).parent)
    where(second, 1).write_bytes(where(second, 1).read_bytes()[:40])
    write_mask(where(third, 2), np.ones((96, 64), bool))
    result = evaluate(tmp/'data', tmp/'run')
    assert np.isclose(result['J'], 100 * (len(data) - 1 - 2 / 3) / len(data), atol=1e-3)
    why = [result['missing'][f'{e.video}/{e.id}'] for e in (first, second, third)]
    assert why[0].startswith('3 of 3') and 'cannot be read' in why[1] and '96x64' in why[2] and len(result['missing']) == 3


def test_objects_are_averaged_first(made):
    "One object's expressions empty: its share of the mean over objects is one object, however many sentences it has."
    tmp, data = made
    v = list(data.videos)[0]; sentences = [e for e in data.expressions[v] if e.object_id == data.expressions[v][0].object_id]
    for e in sentences[1:]: shutil.rmtree(tmp/'run/Annotations'/v/e.id)
    result = evaluate(tmp/'data', tmp/'run')
    assert np.isclose(result['by_object'][f'{v}/{sentences[0].object_id}']['J'], 100 / len(sentences), atol=1e-3)
    assert np.isclose(result['objects']['J'], 100 * (1 - (1 - 1 / len(sentences)) / result['objects']['objects']), atol=1e-3)


def test_a_split_without_masks_cannot_be_scored_but_looked_at_and_packed(made):
    tmp, data = made
    shutil.rmtree(tmp/'data/valid/Annotations')
    with pytest.raises(NoTruth, match='cannot be scored'): evaluate(tmp/'data', tmp/'run', tmp/'scores')
    assert not (tmp/'scores').exists()
    page = report(tmp/'data', {'run': tmp/'run'}, tmp/'r.html', examples=1).read_text()
    assert 'no true masks' in page and page.count('<figure>') == 2
    assert len(zipfile.ZipFile(submission(tmp/'data', tmp/'run', tmp/'s.zip')).namelist()) == 3 * len(data)


def test_one_broken_annotation_leaves_the_others_scored(made):
    tmp, data = made
    v = list(data.videos)[0]; path = sorted((tmp/'data/valid/Annotations'/v).glob('*.png'))[0]; path.write_bytes(path.read_bytes()[:50])
    result = evaluate(tmp/'data', tmp/'run')
    assert set(result['unscored']) == {f'{v}/{e.id}' for e in data.expressions[v]} and path.name in next(iter(result['unscored'].values()))
    assert result['J'] == 100


def test_no_run(made):
    for call in (lambda: evaluate(made[0]/'data', made[0]/'nothing'), lambda: submission(made[0]/'data', made[0]/'nothing', made[0]/'x.zip'),
                 lambda: report(made[0]/'data', {}, made[0]/'x.html'), lambda: overlays(made[0]/'data', {'run': made[0]/'run'}, made[0]/'x.mp4', videos=['nobody'])):
        with pytest.raises(Problem) as e: call()
        assert '\n' not in str(e.value)
    assert not (made[0]/'x.zip').exists()


def test_zip(made):
    tmp, data = made
    a, b = submission(tmp/'data', tmp/'run', tmp/'a.zip'), submission(tmp/'data', tmp/'run', tmp/'sub'/'b.zip')
    assert a.read_bytes() == b.read_bytes()
    with zipfile.ZipFile(a) as box:
        assert {n.split('/')[0] for n in box.namelist()} == {'Annotations'} and box.testzip() is None
        e = next(iter(data)); name = f'{e.video}/{e.id}/{data.videos[e.video].frames[0]}.png'
        assert box.read(f'Annotations/{name}') == (tmp/'run/Annotations'/name).read_bytes()


def test_zip_mends_the_form_of_masks(made):
    "0/1 and palette masks are as good as 0/255, but a server may not think so."
    tmp, data = made
    e = next(iter(data)); folder = tmp/'run/Annotations'/e.video/e.id; mask = data.masks(e)
    Image.fromarray(mask[0].astype(np.uint8)).save(folder/f'{data.videos[e.video].frames[0]}.png')
    p = Image.fromarray(mask[1].astype(np.uint8)); p.putpalette(bytes([0, 0, 0, 255, 255, 255])); p.save(folder/f'{data.videos[e.video].frames[1]}.png')
    with zipfile.ZipFile(submission(tmp/'data', tmp/'run', tmp/'a.zip')) as box: box.extractall(tmp/'x')
    for t, f in enumerate(data.videos[e.video].frames):
        with Image.open(tmp/'x/Annotations'/e.video/e.id/f'{f}.png') as im: assert im.mode == 'L' and (np.array(im) == mask[t] * 255).all()


@pytest.mark.parametrize('spoil, words', [
    (lambda f: f.unlink(), 'no such file'), (lambda f: f.write_bytes(f.read_bytes()[:30]), 'cannot be read'),
    (lambda f: write_mask(f, np.ones((64, 95), bool)), '64x95'), (lambda f: shutil.rmtree(f.parent), '3 faults')])
def test_zip_refuses(made, spoil, words):
    tmp, data = made
    e = list(data)[-1]; spoil(tmp/'run/Annotations'/e.video/e.id/f'{data.videos[e.video].frames[0]}.png')
    (tmp/'s.zip').write_bytes(b'older')
    with pytest.raises(Problem, match=words) as p: submission(tmp/'data', tmp/'run', tmp/'s.zip')
    assert f'{e.video}/{e.id}' in str(p.value) and (tmp/'s.zip').read_bytes() == b'older' and not list(tmp.glob('.tmp-*'))


def test_zip_refuses_a_data_set_with_faults(made):
    tmp, data = made
    path = tmp/'data/meta_expressions/valid/meta_expressions.json'; listing = read_json(path)
    listing['videos'][list(data.videos)[0]]['expressions']['0']['exp'] = ''; write_json(path, listing)
    with pytest.raises(Problem, match='empty sentence'): submission(tmp/'data', tmp/'run', tmp/'s.zip')


def test_report_is_self_contained_and_escapes(made):
    tmp, data = made
    path = tmp/'data/meta_expressions/valid/meta_expressions.json'; listing = read_json(path)
    for v in listing['videos'].values():
        for e in v['expressions'].values(): e['exp'] = '<script>alert(1)</script> & "it"'
    write_json(path, listing)
    shutil.rmtree(tmp/'run/Annotations'/list(data.videos)[0])
    pages = [report(tmp/'data', {'first & best': tmp/'run', 'again': tmp/'run'}, tmp/f'{i}.html', examples=1).read_bytes() for i in '12']
    text = pages[0].decode()
    assert pages[0] == pages[1] and '<script' not in text and 'http' not in text.replace('doctype', '') and 'first &amp; best' in text
    assert 'no masks of this expression' in text


def test_overlays_show_a_run_with_holes(made):
    tmp, data = made
    v = list(data.videos)[0]; shutil.rmtree(tmp/'run/Annotations'/v)
    film = open_clip(overlays(tmp/'data', {'run': tmp/'run'}, tmp/'o.mp4', videos=[v]))
    assert len(film.frames) == 3 * len(data.expressions[v])


def candidates(run, e, scores, frames, mask=None):
    save_candidates(run/'candidates'/e.video/f'{e.id}.safetensors', np.zeros((len(scores), 2, 2)), np.array(scores), np.zeros((len(scores), 4)),
                    dict(kind='logit', size=[64, 96], model='toy', frames=list(frames)))


def test_key_frames(made):
    tmp, data = made
    for i, e in enumerate(data): candidates(tmp/'run', e, [.2, .9, .9] if i % 2 else [.1, .2, .3], data.videos[e.video].frames)
    keys = from_json(choose(tmp/'run'))
    assert [keys[e.video][e.id] for e in data][:4] == [2, 1, 2, 1]
    first = (tmp/'run/key_frame.json').read_bytes(); choose(tmp/'run')
    assert (tmp/'run/key_frame.json').read_bytes() == first
    e = list(data)[1]; write_mask(tmp/'run/Annotations'/e.video/e.id/f'{data.videos[e.video].frames[1]}.png', np.zeros((64, 96), bool))
    other = from_json(choose(tmp/'run', 'best_nonempty'))[e.video][e.id]
    assert other == (2 if data.masks(e)[2].any() else 0)


def test_key_frames_of_broken_candidates(made):
    tmp, data = made
    good, cut, nan = list(data)[:3]
    for e in (good, cut, nan): candidates(tmp/'run', e, [.1, .2, .3] if e != nan else [np.nan] * 3, data.videos[e.video].frames)
    path = tmp/'run/candidates'/cut.video/f'{cut.id}.safetensors'; path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StageFailed) as e: choose(tmp/'run')
    assert f'{cut.video}/{cut.id}' in str(e.value) and f'{nan.video}/{nan.id}' in str(e.value)
    assert from_json(read_json(tmp/'run/key_frame.json')) == {good.video: {good.id: 2}}
    with pytest.raises(Problem, match='no candidates'): choose(tmp/'data')
    with pytest.raises(Problem, match='policy'): choose(tmp/'run', 'luck')
