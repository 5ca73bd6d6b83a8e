"Small trees in the layouts of the benchmarks, made out of RefShapes."
import json
from pathlib import Path

import numpy as np
from PIL import Image

from rvos_nb.data.masks import mask_box, rle_encode, write_labels
from rvos_nb.data.refshapes import scene
from rvos_nb.data.video import write_video

SIZE = (64, 96)


def scenes(videos: int, frames: int, seed: int = 50):
    "`videos` different scenes."
    return [scene(seed + v, 'easy', frames=frames, size=SIZE) for v in range(videos)]


def code(mask: np.ndarray) -> dict:
    "A JSON-able run-length code."
    rle = rle_encode(mask)
    return dict(size=rle['size'], counts=rle['counts'].decode())


def write_davis(root: Path, videos: int = 2, frames: int = 5, annotators: int = 4) -> Path:
    "Ref-DAVIS17 in its converted form: sentence 4 · object + annotator."
    listing = {}
    for v, s in enumerate(scenes(videos, frames)):
        name, names = f'clip-{v}', [f'{t:05d}' for t in range(frames)]
        (root/'valid/JPEGImages'/name).mkdir(parents=True)
        for t, n in enumerate(names):
            Image.fromarray(s.frames[t]).save(root/f'valid/JPEGImages/{name}/{n}.jpg', quality=95)
            write_labels(root/f'valid/Annotations/{name}/{n}.png', s.labels[t])
        said = {o: [x.text for x in s.expressions if x.object_id == o] for o in sorted({x.object_id for x in s.expressions})}
        listing[name] = dict(frames=names, expressions={str(annotators * i + a): dict(exp=texts[a % len(texts)], obj_id=str(o)) for i, (o, texts) in enumerate(said.items()) for a in range(annotators)})
    (root/'meta_expressions/valid').mkdir(parents=True)
    (root/'meta_expressions/valid/meta_expressions.json').write_text(json.dumps(dict(videos=listing)))
    return root


def write_a2d(root: Path, videos: int = 2, frames: int = 6) -> Path:
    "A2D-Sentences: films, the list of samples and the masks as run lengths."
    rows, images, annotations = [], [], []
    for v, s in enumerate(scenes(videos, frames)):
        write_video(root/f'Release/clips320H/film{v}.mp4', s.frames)
        for x in s.expressions[::2]:
            for t in (0, 2, frames - 1):
                mask = s.labels[t] == x.object_id
                if not mask.any(): continue
                key = f'v_film{v}_f_{t + 1}_i_{x.object_id}'
                rows.append([x.text, f'film{v}', t + 1, x.object_id])
                images.append(dict(id=key, height=SIZE[0], width=SIZE[1]))
                annotations.append(dict(id=len(images), image_id=key, category_id=1, segmentation=code(mask)))
    (root/'a2d_sentences_single_frame_test_annotations.json').write_text(json.dumps(rows))
    (root/'a2d_sentences_test_annotations_in_coco_format.json').write_text(json.dumps(dict(images=images, annotations=annotations)))
    return root


def write_jhmdb(root: Path, videos: int = 2, frames: int = 5) -> Path:
    "JHMDB-Sentences: pictures, Matlab masks, and a list with the paths of another machine."
    from scipy.io import savemat
    rows = []
    for v, s in enumerate(scenes(videos, frames)):
        name, x = f'act{v}', s.expressions[0]
        (root/'Rename_Images/jump'/name).mkdir(parents=True); (root/'puppet_mask/jump'/name).mkdir(parents=True)
        for t in range(frames): Image.fromarray(s.frames[t]).save(root/f'Rename_Images/jump/{name}/{t + 1:05d}.png')
        savemat(root/f'puppet_mask/jump/{name}/puppet_mask.mat', {'part_mask': (s.labels == x.object_id).astype(np.uint8).transpose(1, 2, 0)})
        for t in (1, 3, 4): rows.append([name, f'/someone/data/jhmdb_sentences/Rename_Images/jump/{name}/{t:05d}.png', f'data/jhmdb_sentences/puppet_mask/jump/{name}/puppet_mask.mat', frames, x.text])
    (root/'jhmdb_sentences_samples_metadata.json').write_text(json.dumps(rows))
    return root


def write_refcoco(root: Path, videos: int = 3, name: str = 'refcoco+', split: str = 'val') -> Path:
    "RefCOCO: one image entry and one annotation for each sentence; even ones as boxes of four corners, odd ones as run lengths."
    images, annotations = [], []
    (root/'train2014').mkdir(parents=True, exist_ok=True); (root/name).mkdir(exist_ok=True)
    for v, s in enumerate(scenes(videos, 1)):
        Image.fromarray(s.frames[0]).save(root/f'train2014/COCO_train2014_{v:012d}.jpg', quality=95)
        for x in s.expressions:
            mask, n = s.labels[0] == x.object_id, len(images) + 1
            x1, y1, x2, y2 = mask_box(mask); box = [x1, y1, x2 + 1 - x1, y2 + 1 - y1]
            images.append(dict(id=n, file_name=f'COCO_train2014_{v:012d}.jpg', height=SIZE[0], width=SIZE[1], caption=x.text, original_id=v, dataset_name=name))
            corners = [[x1, y1, x2 + 1, y1, x2 + 1, y2 + 1, x1, y2 + 1]]
            annotations.append(dict(id=n, image_id=n, category_id=1, iscrowd=0, area=int(mask.sum()), bbox=box, segmentation=code(mask) if n % 2 else corners))
    (root/name/f'instances_{name}_{split}.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=[])))
    return root


TREES = {'ref-davis17': write_davis, 'a2d-sentences': write_a2d, 'jhmdb-sentences': write_jhmdb, 'refcoco': write_refcoco}
