"What a check finds in trees that are whole, hurt or strange; conversions of originals; and what the commands say."
import json
import os
import pickle
import shutil

import pytest

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.prepare import DAVIS_TEXTS, check, prepare, splits_of
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


def test_unknown_names(tmp_path):
    for name in ('imagenet', '', 'refcoco', 'ref-davis17', 'a2d-sentences'):
        with pytest.raises(Problem): prepare(name, tmp_path)
