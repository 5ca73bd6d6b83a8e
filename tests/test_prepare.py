"What a check finds in trees that are whole, hurt or strange; conversions of originals; and what the commands say."
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.datasets import JHMDB_LISTS, open_dataset
from rvos_nb.data.prepare import DAVIS_TEXTS, JHMDB_SEED, check, draw_jhmdb, prepare, splits_of
from rvos_nb.data.refshapes import LAYOUTS, write


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp('whole')
    for layout, splits in LAYOUTS.items():
        for split in splits: write(root/layout, split, 'easy', 2, seed=8, frames=3, size=(48, 72), layout=layout)
    return root


@pytest.fixture
def tree(whole, tmp_path): return lambda name: shutil.copytree(whole/name, tmp_path/name)


def command(root, capsys, *argv):
    with pytest.raises(SystemExit) as end: main(['data', *(argv or ['check']), str(root)])
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_whole_trees(whole, capsys, layout):
    code, said = command(whole/layout, capsys)
    assert code == 0 and f'layout: {layout}\n' in said.out and 'all is there' in said.out and said.err == ''
    survey = check(whole/layout)
    assert len(survey.counts) == len(LAYOUTS[layout]) and all(n['videos'] == 2 and min(n.values()) > 0 for n in survey.counts.values())


LOSSES = {'ref-youtube-vos': ['train/JPEGImages/easy-00000/00005.jpg', 'valid/Annotations/easy-00001/00005.png', 'test/JPEGImages/test-easy-00000'],
          'ref-davis17': ['valid/JPEGImages/easy-00000', 'train/Annotations/easy-00000/00000.png'], 'mevis': ['valid_u/mask_dict.json', 'train/JPEGImages/easy-00000/00002.jpg'],
          'a2d-sentences': ['Release/clips320H/easy-00000.mp4', 'text_annotations/a2d_annotation_with_instances/easy-00001/00001.h5'],
          'jhmdb-sentences': ['puppet_mask/easy/test-easy-00000/puppet_mask.mat', 'Rename_Images/easy/test-easy-00001/00001.png'],
          'refcoco': ['train2014/COCO_train2014_000000000001.jpg']}


@pytest.mark.parametrize('layout,lost', [(k, p) for k, ps in LOSSES.items() for p in ps])
def test_what_is_lost_is_named(tree, capsys, layout, lost):
    root = tree(layout); path = root/lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, said = command(root, capsys)
    named = path.parent if path.suffix in ('.jpg', '.png') and layout != 'refcoco' else path # of frames and masks the folder is named
    assert code == 1 and str(named) in said.out and 'expected' in said.out and 'all is there' not in said.out and said.err == ''
    assert path.stem in said.out


def test_lists_that_cannot_be_read(tree, capsys):
    for name, path in (('ref-youtube-vos', 'meta_expressions/valid/meta_expressions.json'), ('mevis', 'train/meta_expressions.json'), ('jhmdb-sentences', 'jhmdb_sentences_samples_metadata.json')):
        root = tree(name); (root/path).write_text('{"half')
        code, said = command(root, capsys)
        assert code == 1 and 'not JSON' in said.out and path in said.out


def test_faults_of_the_lists_are_told(tree, capsys):
    root = tree('mevis'); path = root/'train/meta_expressions.json'
    listing = json.loads(path.read_text())
    listing['videos']['easy-00000']['expressions']['0']['exp'] = ''
    path.write_text(json.dumps(listing))
    code, said = command(root, capsys)
    assert code == 1 and 'train: 1 missing or odd' in said.out and 'easy-00000/0' in said.out


def test_published_counts(tree):
    root = tree('ref-youtube-vos')
    for p in root.rglob('refshapes.json'): p.unlink()
    survey = check(root)
    assert survey.expected['valid'] == dict(videos=202, expressions=834, frames=5486) and any('202, as published' in why for _, _, why in survey.odd)
    shutil.rmtree(root/'meta_expressions/test')
    path = root/'meta_expressions/valid/meta_expressions.json'
    listing = json.loads(path.read_text()); one = listing['videos']['easy-00000']
    for i in range(505): listing['videos'][f'v{i}'] = one; (root/f'valid/JPEGImages/v{i}').symlink_to(root/'valid/JPEGImages/easy-00000')
    path.write_text(json.dumps(listing))
    assert any('copy meta_expressions/test' in why for _, _, why in check(root).odd)


def test_sizes_that_differ(tree, capsys):
    root = tree('ref-youtube-vos')
    from PIL import Image
    Image.new('P', (20, 30)).save(root/'valid/Annotations/easy-00000/00000.png')
    code, said = command(root, capsys)
    assert code == 1 and '30x20' in said.out and '48x72' in said.out


def test_a_folder_that_is_none(tmp_path, capsys):
    for root in (tmp_path, tmp_path/'nowhere'):
        code, said = command(root, capsys)
        assert code == 1 and said.err.count('\n') == 1 and said.out == ''
    with pytest.raises(Problem, match='layout'): check(tmp_path, 'imagenet')
    assert splits_of(tmp_path, 'mevis') == []


# conversions

def files(root): return {str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file() or p.is_symlink()}


@pytest.fixture
def davis(tree, tmp_path):
    "Ref-DAVIS17 in its original archives, made out of the converted tree; and that tree."
    known, root = tree('ref-davis17'), tmp_path/'original'/'davis'
    lines = {t: [] for t in DAVIS_TEXTS}
    for split, name in (('train', 'train'), ('valid', 'val')):
        listing = json.loads((known/f'meta_expressions/{split}/meta_expressions.json').read_text())['videos']
        (root/'DAVIS/ImageSets/2017').mkdir(parents=True, exist_ok=True); (root/f'DAVIS/ImageSets/2017/{name}.txt').write_text(''.join(f'{split}-{v}\n' for v in listing))
        for v, entry in listing.items():
            for kind, to in (('JPEGImages', 'JPEGImages'), ('Annotations', 'Annotations_unsupervised')): shutil.copytree(known/split/kind/v, root/f'DAVIS/{to}/480p/{split}-{v}')
            for k, e in entry['expressions'].items(): lines[DAVIS_TEXTS[int(k) % 4]].append(f'{split}-{v} {e["obj_id"]} "{e["exp"]}"')
    (root/'davis_text_annotations').mkdir()
    for i, t in enumerate(DAVIS_TEXTS): (root/f'davis_text_annotations/{t}.txt').write_bytes('\n'.join(reversed(lines[t])).encode(('utf-8', 'latin-1')[i // 2]))
    return root, known


def test_davis_from_the_archives(davis, capsys):
    root, known = davis
    originals = files(root)
    for _ in range(2):
        code, said = command(root, capsys, 'prepare', 'ref-davis17')
        assert code == 0 and said.err == '' and said.out.count('2 videos') == 2
        after = files(root); again = after if _ == 0 else again
        assert after == again and {k: v for k, v in after.items() if k in originals} == originals
    for split in ('train', 'valid'):
        ours, theirs = open_dataset(root, split), open_dataset(known, split)
        assert ours.layout == 'ref-davis17' and not ours.faults and [(e.id, e.text, e.object_id) for e in ours] == [(e.id, e.text, e.object_id) for e in theirs]
        assert all((ours.masks(a) == theirs.masks(b)).all() for a, b in zip(ours, theirs))
    shutil.move(root, root.with_name('moved')) # links are relative
    assert open_dataset(root.with_name('moved'), layout='ref-davis17').masks(next(iter(open_dataset(root.with_name('moved'))))).any()


@pytest.mark.parametrize('spoil,word', [('line', 'VIDEO OBJECT'), ('sentence', 'VIDEO OBJECT'), ('gone', 'unpack'), ('set', 'unpack')])
def test_davis_texts_that_are_odd(davis, capsys, spoil, word):
    root, _ = davis; text = root/f'davis_text_annotations/{DAVIS_TEXTS[2]}.txt'
    if spoil == 'line': text.write_text('a dog\n')
    if spoil == 'sentence': text.write_text('valid-easy-00000 1 ""\n')
    if spoil == 'gone': text.unlink()
    if spoil == 'set': shutil.rmtree(root/'DAVIS/ImageSets')
    code, said = command(root, capsys, 'prepare', 'ref-davis17')
    assert code == 1 and word in said.err and said.err.count('\n') == 1


def test_davis_videos_that_are_odd(davis, capsys):
    root, _ = davis; text = root/f'davis_text_annotations/{DAVIS_TEXTS[1]}.txt'
    text.write_text('\n'.join(x for x in text.read_text().splitlines() if not x.startswith('valid-easy-00000 1 ')))
    shutil.rmtree(root/'DAVIS/JPEGImages/480p/train-easy-00001')
    code, said = command(root, capsys, 'prepare', 'ref-davis17')
    assert code == 1 and said.out.count('left out: ') == 2 and said.out.count('1 videos') == 2 and 'the same objects' in said.out


def refer(root, name='refcocog', by='umd'):
    "The toolkit's two files, out of the converted lists, which are removed."
    images, annotations, refs = {}, [], []
    for path in sorted((root/name).glob(f'instances_{name}_*.json')):
        made = json.loads(path.read_text()); path.unlink()
        for i, a in zip(made['images'], made['annotations']):
            images[i['original_id']] = i | dict(id=i['original_id'])
            annotations.append(a | dict(id=len(annotations) + 500, image_id=i['original_id']))
            refs.append(dict(ref_id=len(refs), ann_id=annotations[-1]['id'], image_id=i['original_id'], split=path.stem.split('_')[-1], sentences=[dict(sent=i['caption'], raw=i['caption'].upper(), tokens=i['caption'].split())]))
    (root/name/'instances.json').write_text(json.dumps(dict(images=list(images.values()), annotations=annotations, categories=[dict(id=1, name='thing')])))
    (root/name/f'refs({by}).p').write_bytes(pickle.dumps(refs, 0))
    return refs, annotations


def test_refcoco_from_the_toolkit(tree, whole, capsys):
    root = tree('refcoco'); refs, annotations = refer(root)
    for _ in range(2):
        code, said = command(root, capsys, 'prepare', 'refcoco')
        assert code == 0 and said.out.count('sentences') == 3
    for split in ('train', 'val', 'test'):
        ours, theirs = open_dataset(root, split), open_dataset(whole/'refcoco', split)
        assert not ours.faults and [(e.id, e.text, e.video) for e in ours] == [(e.id, e.text, e.video) for e in theirs] and all((ours.masks(a) == theirs.masks(b)).all() for a, b in zip(ours, theirs))
    assert check(root).odd == []


def test_refcoco_entries_that_are_odd(tree, capsys):
    root = tree('refcoco'); refs, annotations = refer(root)
    refs[0]['ann_id'] = 7; del refs[1]['split']; refs[2] = None; refs[3]['split'] = '../x'
    (root/'refcocog/refs(umd).p').write_bytes(pickle.dumps(refs, 2))
    code, said = command(root, capsys, 'prepare', 'refcoco')
    assert code == 1 and said.out.count('left out: ') == 4 and said.err == ''


class Calls:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')


def test_a_pickle_runs_nothing(tree, tmp_path, capsys):
    root = tree('refcoco'); refer(root)
    for protocol in range(6):
        (root/'refcocog/refs(umd).p').write_bytes(pickle.dumps([Calls(str(tmp_path/'called'))], protocol))
        code, said = command(root, capsys, 'prepare', 'refcoco')
        assert code == 1 and 'plain data' in said.err and said.err.count('\n') == 1 and not (tmp_path/'called').exists()


def test_lists_that_lie_there_are_kept(tree, capsys):
    root = tree('refcoco'); refer(root)
    path = root/'refcocog/instances_refcocog_val.json'; path.write_text('[]')
    code, said = command(root, capsys, 'prepare', 'refcoco')
    assert code == 1 and 'another list' in said.err and path.read_text() == '[]'


def jhmdb(root, lines=None):
    "The archive's sentences, out of the published list, which is removed."
    path = root/JHMDB_LISTS[0]; texts = {v: t for v, *_, t in json.loads(path.read_text())}; path.unlink()
    (root/'jhmdb_annotation.txt').write_text('video_id,query\n' + '\n'.join(lines or [f'{v},"{t}"' for v, t in texts.items()]) + '\n')
    return texts


def longer(root, video, frames, masks):
    "A video with more pictures and masks."
    from scipy.io import savemat
    folder = next(root.glob(f'Rename_Images/*/{video}'))
    for t in range(1, frames + 1): (folder/f'{t:05d}.png').exists() or shutil.copy(folder/'00001.png', folder/f'{t:05d}.png')
    savemat(root/f'puppet_mask/{folder.parent.name}/{video}/puppet_mask.mat', {'part_mask': np.arange(1, masks + 1, dtype=np.uint8) * np.ones((48, 72, 1), np.uint8)})


def test_jhmdb_from_the_archive(tree, capsys):
    root = tree('jhmdb-sentences'); texts = jhmdb(root)
    longer(root, 'test-easy-00000', 40, 25); longer(root, 'test-easy-00001', 9, 1)
    originals = files(root)
    for _ in range(2):
        code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
        assert code == 0 and said.err == '' and '4 samples' in said.out and f'seed {JHMDB_SEED}' in said.out
        after = files(root); again = after if _ == 0 else again
        assert after == again and {k: v for k, v in after.items() if k in originals} == originals and set(after) - set(originals) == {JHMDB_LISTS[1]}
    data = open_dataset(root, 'test')
    assert data.layout == 'jhmdb-sentences' and not data.faults and {e.video: e.text for e in data} == texts and {v: len(x.frames) for v, x in data.videos.items()} == {'test-easy-00000': 25, 'test-easy-00001': 1}
    asked = [e.frame for e in data.expressions['test-easy-00000']]
    assert len(asked) == 3 and asked == sorted({*asked}) and 0 <= asked[0] <= asked[-1] < 25 and all(data.masks(e).all() for e in data)
    assert check(root).odd == [] and check(root).counts['test'] == dict(videos=2, expressions=4, frames=4, masks=4)


def test_the_draw_of_jhmdb_depends_on_names_only(tree):
    root = tree('jhmdb-sentences'); texts = jhmdb(root)
    longer(root, 'test-easy-00000', 40, 40); longer(root, 'test-easy-00001', 40, 40)
    one = draw_jhmdb(root)[0]
    (root/'jhmdb_annotation.txt').write_text('video_id,query\n' + '\n'.join(f'{v},{t}' for v, t in reversed(texts.items())))
    two = draw_jhmdb(root)[0]
    assert one != two and sorted(one) == sorted(two) and [r[1] for r in one[:3]] != [r[1].replace('00001/', '00000/') for r in one[3:]]
    (root/'jhmdb_annotation.txt').write_text('video_id,query\ntest-easy-00001,another\n')
    assert [r[:4] for r in draw_jhmdb(root)[0]] == [r[:4] for r in one if r[0] == 'test-easy-00001']


def test_jhmdb_published_samples_go_first(tree, capsys):
    root = tree('jhmdb-sentences'); published, ours = (root/n for n in JHMDB_LISTS); originals = files(root)
    known = [(e.video, e.id, e.text) for e in open_dataset(root, 'test')]
    for _ in range(2):
        code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
        assert code == 0 and 'with paths from this folder' in said.out and {k: v for k, v in files(root).items() if k != ours.name} == originals
    rows = json.loads(ours.read_text())
    assert all((root/p).exists() for r in rows for p in r[1:3]) and [(r[0], r[3:]) for r in rows] == [(r[0], r[3:]) for r in json.loads(published.read_text())]
    published.unlink(); assert [(e.video, e.id, e.text) for e in open_dataset(root, 'test')] == known
    ours.rename(published) # its paths need no other list
    code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
    assert code == 0 and 'as they are' in said.out and not ours.exists()
    rows[1][1] = 'somewhere'; rows[2] = rows[2][:3]; rows[3][1] = '/data/Rename_Images/../test-easy-00000/00001.png'; published.write_text(json.dumps(rows))
    code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
    assert code == 1 and said.out.count('left out: ') == 3 and all(f'entry {n}' in said.out for n in (1, 2, 3))


def test_jhmdb_lines_and_masks_that_are_odd(tree, capsys):
    root = tree('jhmdb-sentences')
    texts = jhmdb(root, ['test-easy-00000,it runs', 'test-easy-00000,again', 'nobody,it', 'test-easy-00001,it', '../x,it', 'test-easy-00001'])
    mask = next(root.glob('puppet_mask/*/test-easy-00001/puppet_mask.mat')); mask.write_bytes(b'no Matlab')
    code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
    assert code == 1 and said.out.count('left out: ') == 5 and 'cannot be read' in said.out and 'line 3' in said.out and said.err == '' and len(texts) == 2
    mask.unlink(); shutil.rmtree(next(root.glob('puppet_mask/*/test-easy-00000'))); (root/JHMDB_LISTS[1]).unlink()
    code, said = command(root, capsys, 'prepare', 'jhmdb-sentences')
    assert code == 1 and 'no usable sentence' in said.err and said.err.count('\n') == 1 and not (root/JHMDB_LISTS[1]).exists()


def test_ytvos_for_uninext(tree, capsys):
    root = tree('ref-youtube-vos'); originals = files(root)
    for _ in range(2):
        code, said = command(root, capsys, 'prepare', 'ref-youtube-vos')
        assert code == 0 and said.err == '' and {k: v for k, v in files(root).items() if k not in ('valid.json', 'test.json')} == originals
        again = files(root) if _ == 0 else again
        assert files(root) == again
    for split in ('valid', 'test'):
        made, data = json.loads((root/f'{split}.json').read_text()), open_dataset(root, split)
        assert set(made) == {'videos', 'categories'} and [(c['id'], c['name']) for c in made['categories']] == [(1, 'object')]
        assert [v['id'] for v in made['videos']] == list(range(1, len(data) + 1))
        for v, e in zip(made['videos'], data):
            assert v == dict(id=v['id'], height=48, width=72, length=3, file_names=[f'{e.video}/{n}.jpg' for n in data.videos[e.video].frames], expressions=[e.text], video=e.video, exp_id=e.id)


def test_ytvos_with_faults_is_not_written(tree, capsys):
    root = tree('ref-youtube-vos')
    shutil.rmtree(root/'test/JPEGImages/test-easy-00001')
    code, said = command(root, capsys, 'prepare', 'ref-youtube-vos')
    assert code == 1 and 'left out: test-easy-00001' in said.out and (root/'valid.json').exists() and not (root/'test.json').exists()
    for s in ('valid', 'test'): shutil.rmtree(root/'meta_expressions'/s)
    code, said = command(root, capsys, 'prepare', 'ref-youtube-vos')
    assert code == 1 and said.err.count('\n') == 1


def test_annotations_that_are_missing_are_named(tree):
    root = tree('ref-youtube-vos'); assert check(root).counts['train']['masks'] == 6
    shutil.rmtree(root/'train/Annotations/easy-00000')
    survey = check(root)
    assert survey.counts['train']['masks'] == 3 and [(s, u) for s, u, _ in survey.odd] == [('train', 'easy-00000')] and '3 of 3 masks missing: 00000, 00005, 00010' in survey.odd[0][2]
    path = root/'meta_expressions/train/meta_expressions.json'; listing = json.loads(path.read_text())
    for e in listing['videos']['easy-00000']['expressions'].values(): del e['obj_id']
    path.write_text(json.dumps(listing)); assert check(root).odd == [] # the answer is hidden


def test_unknown_names(tmp_path):
    for name in ('imagenet', '', 'refcoco', 'ref-davis17', 'a2d-sentences', 'jhmdb-sentences', 'ref-youtube-vos', 'mevis'):
        with pytest.raises(Problem): prepare(name, tmp_path)
