"Reading the Ref-YouTube-VOS layout: what is tolerated, and one clear line for everything else."
import copy
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from rvos_nb.core import Problem
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.refshapes import write
from rvos_nb.data.video import read_video

JSON = 'meta_expressions/valid/meta_expressions.json'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('made')
    write(root, 'valid', 'easy', 3, seed=4, frames=3, size=(48, 72))
    return root


@pytest.fixture
def tree(made, tmp_path):
    shutil.copytree(made, tmp_path/'data')
    return tmp_path/'data'


def edit(tree, change):
    "Apply `change` to the listing's videos."
    listing = json.loads((tree/JSON).read_text())
    change(listing['videos'])
    (tree/JSON).write_text(json.dumps(listing))


def one_line(problem, *words):
    text = str(problem)
    assert '\n' not in text and all(w in text for w in ('found ', 'expected ', *words)), text


def test_order_and_text_are_kept(tree):
    def change(videos):
        v = videos['easy-00001']
        v['expressions'] = {str(k): {'exp': f' The  Dog {k} ', 'obj_id': '1'} for k in range(12)}
    edit(tree, change)
    data = open_dataset(tree)
    assert [e.id for e in data.expressions['easy-00001']] == [str(k) for k in range(12)]
    assert data.expressions['easy-00001'][3].text == ' The  Dog 3 '


def test_masks(tree):
    data = open_dataset(tree)
    for e in data:
        m = data.masks(e)
        assert m.shape == (3, 48, 72) and m.dtype == bool and m.any()
    e = next(iter(data))
    ids = np.array(Image.open(tree/'valid/Annotations'/e.video/'00005.png'))
    assert (data.masks(e)[1] == (ids == int(e.object_id))).all()


def test_hidden_answers_give_none(tree):
    def change(videos):
        for x in videos['easy-00000']['expressions'].values(): del x['obj_id']
        for x in videos['easy-00001']['expressions'].values(): x['obj_id'] = int(x['obj_id'])
    edit(tree, change)
    for p in list((tree/'valid/Annotations/easy-00002').iterdir())[:]:
        if p.stem != '00000': p.unlink()
    data = open_dataset(tree)
    first, second, third = (v[0] for v in data.expressions.values())
    assert data.masks(first) is None and data.masks(second).any() and data.masks(third) is None
    shutil.rmtree(tree/'valid/Annotations')
    data = open_dataset(tree)
    assert all(data.masks(e) is None for e in data)


def test_valid_excludes_test(tree):
    (tree/'meta_expressions/test').mkdir()
    listing = json.loads((tree/JSON).read_text())
    part = {'videos': {'easy-00002': listing['videos']['easy-00002']}}
    (tree/'meta_expressions/test/meta_expressions.json').write_text(json.dumps(part))
    assert list(open_dataset(tree).videos) == ['easy-00000', 'easy-00001']
    assert open_dataset(tree, 'test').videos['easy-00002'].folder == tree/'valid/JPEGImages/easy-00002'
    shutil.copytree(tree/'valid/JPEGImages/easy-00002', tree/'test/JPEGImages/easy-00002')
    assert open_dataset(tree, 'test').videos['easy-00002'].folder == tree/'test/JPEGImages/easy-00002'


WHOLE_FILE = ['[]', '3', 'null', '{}', '{"videos": []}', '{"videos": {}}', '{"videos": "x"}', '{"videos": {', '', '\xff\xfe']


@pytest.mark.parametrize('text', WHOLE_FILE)
def test_json_that_is_not_the_layout(tree, text):
    (tree/JSON).write_bytes(text.encode('latin-1'))
    with pytest.raises(Problem) as e: open_dataset(tree)
    one_line(e.value, 'meta_expressions.json')


@pytest.mark.parametrize('split', ['train', '../x', '.'])
def test_split_that_is_not_there(tree, split):
    with pytest.raises(Problem) as e: open_dataset(tree, split)
    one_line(e.value)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(Problem) as e: open_dataset(tmp_path/'nothing')
    one_line(e.value, 'no such folder')


EXPRESSIONS = dict(empty={'exp': ''}, blank={'exp': ' \t\n'}, missing={'obj_id': '1'}, number={'exp': 3}, null=None, text='the dog', listed=['the dog'],
                   object_zero={'exp': 'a', 'obj_id': '0'}, object_path={'exp': 'a', 'obj_id': '../1'}, object_list={'exp': 'a', 'obj_id': [1, 2]}, object_flag={'exp': 'a', 'obj_id': True})


@pytest.mark.parametrize('entry', EXPRESSIONS.values(), ids=list(EXPRESSIONS))
def test_a_bad_expression_takes_only_itself_away(tree, entry):
    before = open_dataset(tree)
    edit(tree, lambda videos: videos['easy-00001']['expressions'].update({'1': entry}))
    data = open_dataset(tree)
    assert list(data.faults) == ['easy-00001/1'] and len(data) == len(before) - 1 and list(data.videos) == list(before.videos)
    one_line(data.faults['easy-00001/1'], 'easy-00001', 'expression 1')


BAD_IDS = ['../x', '..', '.', '', '/etc', 'a/b', 'a\\b', 'a\0b', '.hidden']


@pytest.mark.parametrize('id', BAD_IDS)
def test_ids_that_are_no_path_component(tree, id):
    def change(videos):
        videos['easy-00000']['expressions'][id] = {'exp': 'the dog'}
        videos['easy-00001']['frames'][1] = id
        videos[id] = copy.deepcopy(videos['easy-00002'])
    edit(tree, change)
    data = open_dataset(tree)
    assert set(data.faults) == {f'easy-00000/{id}', 'easy-00001', id} and list(data.videos) == ['easy-00000', 'easy-00002']
    for reason in data.faults.values(): one_line(reason, repr(id))


VIDEOS = dict(null=None, listed=[], no_frames={'expressions': {'0': {'exp': 'a'}}}, no_expressions={'frames': ['00000']}, frames_text={'frames': '00000', 'expressions': {}},
              expressions_list={'frames': ['00000'], 'expressions': [{'exp': 'a'}]}, empty_frames={'frames': [], 'expressions': {'0': {'exp': 'a'}}},
              number_frames={'frames': [0], 'expressions': {'0': {'exp': 'a'}}}, twice={'frames': ['00000', '00000'], 'expressions': {'0': {'exp': 'a'}}},
              silent={'frames': ['00000'], 'expressions': {}})


@pytest.mark.parametrize('entry', VIDEOS.values(), ids=list(VIDEOS))
def test_a_bad_video_takes_only_itself_away(tree, entry):
    edit(tree, lambda videos: videos.update({'easy-00001': entry}))
    data = open_dataset(tree)
    assert list(data.faults) == ['easy-00001'] and list(data.videos) == ['easy-00000', 'easy-00002'] == list(data.expressions)
    one_line(data.faults['easy-00001'], 'easy-00001')


def test_a_video_without_pictures(tree):
    shutil.rmtree(tree/'valid/JPEGImages/easy-00001')
    data = open_dataset(tree)
    assert list(data.faults) == ['easy-00001'] and len(data.videos) == 2
    one_line(data.faults['easy-00001'], 'no such folder')


def test_a_missing_frame_is_named_when_read(tree):
    path = tree/'valid/JPEGImages/easy-00001/00005.jpg'
    path.unlink()
    data = open_dataset(tree)
    with pytest.raises(Problem) as e: list(read_video(data.videos['easy-00001']))
    one_line(e.value, str(path))
    assert len(list(read_video(data.videos['easy-00002']))) == 3


def test_a_truncated_frame_is_named_when_read(tree):
    path = tree/'valid/JPEGImages/easy-00001/00005.jpg'
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(Problem) as e: list(read_video(open_dataset(tree).videos['easy-00001']))
    one_line(e.value, str(path))


@pytest.mark.parametrize('spoil', ['size', 'truncated', 'missing', 'colour'])
def test_a_bad_mask_is_named_when_read(tree, spoil):
    path = tree/'valid/Annotations/easy-00001/00005.png'
    if spoil == 'size': Image.fromarray(np.ones((20, 30), np.uint8)).save(path)
    if spoil == 'truncated': path.write_bytes(path.read_bytes()[:60])
    if spoil == 'missing': path.unlink()
    if spoil == 'colour': Image.fromarray(np.ones((48, 72, 3), np.uint8)).save(path)
    data = open_dataset(tree)
    with pytest.raises(Problem) as e: data.masks(data.expressions['easy-00001'][0])
    one_line(e.value, str(path))
    assert data.masks(data.expressions['easy-00002'][0]).any()


def test_reading_fuzzed_json_never_raises_anything_but_a_problem(tree):
    "Replace one value of the JSON at a time by something odd."
    listing, rng, odd = json.loads((tree/JSON).read_text()), np.random.default_rng(0), [None, 3, '', [], {}, '../x', [None], {'a': 1}, 1.5, True]
    for _ in range(200):
        spoilt = copy.deepcopy(listing); at = spoilt
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys: break
            key = keys[rng.integers(len(keys))]
            if not isinstance(at[key], (dict, list)) or rng.random() < .3: at[key] = odd[rng.integers(len(odd))]; break
            at = at[key]
        (tree/JSON).write_text(json.dumps(spoilt))
        try: data = open_dataset(tree)
        except Problem as e: one_line(e); continue
        for reason in data.faults.values(): one_line(reason)
        assert all(e.text.strip() for e in data)
