"Reading eight layouts: what is tolerated, and one clear line for everything else."

import copy
import json
import os
import shutil

import numpy as np
import pytest
from helpers import spoil
from PIL import Image

from rvos_nb.core import Problem
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.index import read_code
from rvos_nb.data.masks import count_pixels, rle_encode
from rvos_nb.data.refshapes import write
from rvos_nb.data.video import read_video
from rvos_nb.data.videos import read_annotation

JSON = "meta_expressions/valid/meta_expressions.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write(root, "valid", "easy", 3, seed=4, frames=3, size=(48, 72))
    return root


@pytest.fixture
def tree(made, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def edit(tree, change):
    "Apply `change` to the listing's videos."
    listing = json.loads((tree / JSON).read_text())
    change(listing["videos"])
    (tree / JSON).write_text(json.dumps(listing))


def one_line(problem, *words):
    text = str(problem)
    assert "\n" not in text and all(w in text for w in ("found ", "expected ", *words)), text


def test_order_and_text_are_kept(tree):
    def change(videos):
        v = videos["easy-00001"]
        v["expressions"] = {str(k): {"exp": f" The  Dog {k} ", "obj_id": "1"} for k in range(12)}

    edit(tree, change)
    data = open_dataset(tree)
    assert [e.id for e in data.expressions["easy-00001"]] == [str(k) for k in range(12)]
    assert data.expressions["easy-00001"][3].text == " The  Dog 3 "


def test_masks(tree):
    data = open_dataset(tree)
    for e in data:
        m = data.masks(e)
        assert m.shape == (3, 48, 72) and m.dtype == bool and m.any()
    e = next(iter(data))
    ids = np.array(Image.open(tree / "valid/Annotations" / e.video / "00005.png"))
    assert (data.masks(e)[1] == (ids == int(e.object_id))).all()


def test_hidden_answers_give_none(tree):
    def change(videos):
        for x in videos["easy-00000"]["expressions"].values():
            del x["obj_id"]
        for x in videos["easy-00001"]["expressions"].values():
            x["obj_id"] = int(x["obj_id"])

    edit(tree, change)
    for p in list((tree / "valid/Annotations/easy-00002").iterdir())[:]:
        if p.stem != "00000":
            p.unlink()
    data = open_dataset(tree)
    first, second, third = (v[0] for v in data.expressions.values())
    assert data.masks(first) is None and data.masks(second).any() and data.masks(third) is None
    shutil.rmtree(tree / "valid/Annotations")
    data = open_dataset(tree)
    assert all(data.masks(e) is None for e in data)


def test_valid_excludes_test(tree):
    (tree / "meta_expressions/test").mkdir()
    listing = json.loads((tree / JSON).read_text())
    part = {"videos": {"easy-00002": listing["videos"]["easy-00002"]}}
    (tree / "meta_expressions/test/meta_expressions.json").write_text(json.dumps(part))
    assert list(open_dataset(tree).videos) == ["easy-00000", "easy-00001"]
    assert (
        open_dataset(tree, "test").videos["easy-00002"].folder
        == tree / "valid/JPEGImages/easy-00002"
    )
    shutil.copytree(tree / "valid/JPEGImages/easy-00002", tree / "test/JPEGImages/easy-00002")
    assert (
        open_dataset(tree, "test").videos["easy-00002"].folder
        == tree / "test/JPEGImages/easy-00002"
    )


WHOLE_FILE = [
    "[]",
    "3",
    "null",
    "{}",
    '{"videos": []}',
    '{"videos": {}}',
    '{"videos": "x"}',
    '{"videos": {',
    "",
    "\xff\xfe",
]


@pytest.mark.parametrize("text", WHOLE_FILE)
def test_json_that_is_not_the_layout(tree, text):
    (tree / JSON).write_bytes(text.encode("latin-1"))
    with pytest.raises(Problem) as e:
        open_dataset(tree)
    one_line(e.value, "meta_expressions.json")


@pytest.mark.parametrize("split", ["train", "../x", "."])
def test_split_that_is_not_there(tree, split):
    with pytest.raises(Problem) as e:
        open_dataset(tree, split)
    one_line(e.value)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(Problem) as e:
        open_dataset(tmp_path / "nothing")
    one_line(e.value, "no such folder")


EXPRESSIONS = {
    "empty": {"exp": ""},
    "blank": {"exp": " \t\n"},
    "missing": {"obj_id": "1"},
    "number": {"exp": 3},
    "null": None,
    "text": "the dog",
    "listed": ["the dog"],
    "object_zero": {"exp": "a", "obj_id": "0"},
    "object_path": {"exp": "a", "obj_id": "../1"},
    "object_list": {"exp": "a", "obj_id": [1, 2]},
    "object_flag": {"exp": "a", "obj_id": True},
}


@pytest.mark.parametrize("entry", EXPRESSIONS.values(), ids=list(EXPRESSIONS))
def test_a_bad_expression_takes_only_itself_away(tree, entry):
    before = open_dataset(tree)
    edit(tree, lambda videos: videos["easy-00001"]["expressions"].update({"1": entry}))
    data = open_dataset(tree)
    assert (
        list(data.faults) == ["easy-00001/1"]
        and len(data) == len(before) - 1
        and list(data.videos) == list(before.videos)
    )
    one_line(data.faults["easy-00001/1"], "easy-00001", "expression 1")


BAD_IDS = ["../x", "..", ".", "", "/etc", "a/b", "a\\b", "a\0b", ".hidden"]


@pytest.mark.parametrize("id", BAD_IDS)
def test_ids_that_are_no_path_component(tree, id):
    def change(videos):
        videos["easy-00000"]["expressions"][id] = {"exp": "the dog"}
        videos["easy-00001"]["frames"][1] = id
        videos[id] = copy.deepcopy(videos["easy-00002"])

    edit(tree, change)
    data = open_dataset(tree)
    assert set(data.faults) == {f"easy-00000/{id}", "easy-00001", id} and list(data.videos) == [
        "easy-00000",
        "easy-00002",
    ]
    for reason in data.faults.values():
        one_line(reason, repr(id))


VIDEOS = {
    "null": None,
    "listed": [],
    "no_frames": {"expressions": {"0": {"exp": "a"}}},
    "no_expressions": {"frames": ["00000"]},
    "frames_text": {"frames": "00000", "expressions": {}},
    "expressions_list": {"frames": ["00000"], "expressions": [{"exp": "a"}]},
    "empty_frames": {"frames": [], "expressions": {"0": {"exp": "a"}}},
    "number_frames": {"frames": [0], "expressions": {"0": {"exp": "a"}}},
    "twice": {"frames": ["00000", "00000"], "expressions": {"0": {"exp": "a"}}},
    "silent": {"frames": ["00000"], "expressions": {}},
}


@pytest.mark.parametrize("entry", VIDEOS.values(), ids=list(VIDEOS))
def test_a_bad_video_takes_only_itself_away(tree, entry):
    edit(tree, lambda videos: videos.update({"easy-00001": entry}))
    data = open_dataset(tree)
    assert list(data.faults) == ["easy-00001"] and list(data.videos) == [
        "easy-00000",
        "easy-00002",
    ] == list(data.expressions)
    one_line(data.faults["easy-00001"], "easy-00001")


def test_a_video_without_pictures(tree):
    shutil.rmtree(tree / "valid/JPEGImages/easy-00001")
    data = open_dataset(tree)
    assert list(data.faults) == ["easy-00001"] and len(data.videos) == 2
    one_line(data.faults["easy-00001"], "no such folder")


def test_a_missing_frame_is_named_when_read(tree):
    path = tree / "valid/JPEGImages/easy-00001/00005.jpg"
    path.unlink()
    data = open_dataset(tree)
    with pytest.raises(Problem) as e:
        list(read_video(data.videos["easy-00001"]))
    one_line(e.value, str(path))
    assert len(list(read_video(data.videos["easy-00002"]))) == 3


def test_a_truncated_frame_is_named_when_read(tree):
    path = tree / "valid/JPEGImages/easy-00001/00005.jpg"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(Problem) as e:
        list(read_video(open_dataset(tree).videos["easy-00001"]))
    one_line(e.value, str(path))


@pytest.mark.parametrize("damage", ["size", "truncated", "missing", "colour"])
def test_a_bad_mask_is_named_when_read(tree, damage):
    path = tree / "valid/Annotations/easy-00001/00005.png"
    if damage == "size":
        Image.fromarray(np.ones((20, 30), np.uint8)).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    if damage == "missing":
        path.unlink()
    if damage == "colour":
        Image.fromarray(np.ones((48, 72, 3), np.uint8)).save(path)
    data = open_dataset(tree)
    with pytest.raises(Problem) as e:
        data.masks(data.expressions["easy-00001"][0])
    one_line(e.value, str(path))
    assert data.masks(data.expressions["easy-00002"][0]).any()


def twice(text, key, of, level):
    """The text of a JSON in which the entry `key` of the object `of` stands once more,
    with the same or another value."""
    for same in (True, False):
        found = json.loads(text)
        at = found["videos"]
        for k in level:
            at = at[k]
        yield text.replace(
            json.dumps(at),
            json.dumps(at)[:-1] + f", {json.dumps(key)}: {json.dumps(at[key] if same else of)}}}",
            1,
        )


@pytest.mark.parametrize(
    "layout,split,file",
    [
        ("ref-youtube-vos", "valid", JSON),
        ("ref-davis17", "valid", JSON),
        ("mevis", "valid_u", "valid_u/meta_expressions.json"),
    ],
)
def test_ids_given_twice(tmp_path, layout, split, file):
    root = tmp_path / layout
    write(root, split, "easy", 2, seed=4, frames=2, size=(48, 72), layout=layout)
    whole, path = open_dataset(root, split, layout), root / file
    text = json.dumps(json.loads(path.read_text()))
    rest = [e for e in whole if e.video == "easy-00001"]
    cases = {
        ("easy-00001", ()): ("easy-00001", [e for e in whole if e.video == "easy-00000"]),
        ("0", ("easy-00000", "expressions")): ("easy-00000/0", list(whole)[1:]),
        ("exp", ("easy-00000", "expressions", "0")): ("easy-00000/0", list(whole)[1:]),
        ("obj_id", ("easy-00000", "expressions", "0")): ("easy-00000/0", list(whole)[1:]),
        ("frames", ("easy-00000",)): ("easy-00000", rest),
    }
    for (key, level), (unit, left) in cases.items():
        for spoilt in twice(text, key, {"exp": "another"}, level):
            path.write_text(spoilt)
            assert spoilt != text
            data = open_dataset(root, split, layout)
            assert list(data.faults) == [unit] and list(data) == left
            one_line(data.faults[unit], str(path), "easy-0000")
    path.write_text(text[:-1] + ', "videos": {}}')
    with pytest.raises(Problem) as e:
        open_dataset(root, split, layout)
    one_line(e.value, '"videos" twice')


def test_nested_json(tree):
    deep = 0
    for _ in range(500):
        deep = [deep]
    edit(tree, lambda videos: videos["easy-00000"].update(frames=["00000", deep]))
    data = open_dataset(tree)
    one_line(data.faults["easy-00000"], "easy-00000")
    assert len(data.videos) == 2 and len(data.faults["easy-00000"]) < 500
    (tree / JSON).write_text('{"videos": ' + "[" * 100_000)
    with pytest.raises(Problem) as e:
        open_dataset(tree)
    one_line(e.value, "nested")


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "\ud800", "a" * 10**6],
    ids=["long number", "half a character", "a megabyte"],
)
def test_values_that_break_python(tree, value):
    def change(videos):
        videos["easy-00000"]["expressions"]["0"]["obj_id"] = value
        videos["easy-00000"]["expressions"][value] = {"exp": "it"}
        videos["easy-00001"]["frames"][1] = value
        videos["easy-00002"]["expressions"]["0"]["exp"] = value

    edit(tree, change)
    data = open_dataset(tree)
    assert (
        "easy-00000/0" in data.faults
        and "easy-00001" in data.faults
        and ("easy-00002/0" in data.faults) == (value == "\ud800")
        and len(data.faults) == 3 + (value == "\ud800")
    )
    assert all(len(unit.encode()) <= 200 for unit in data.faults)
    for reason in data.faults.values():
        one_line(reason.replace(value, ""))
        assert len(reason) < 700 + 2 * len(value)


def test_reading_fuzzed_json_never_raises_anything_but_a_problem(tree):
    "Replace one value of the JSON at a time by something odd."
    listing, rng = json.loads((tree / JSON).read_text()), np.random.default_rng(0)
    for _ in range(200):
        spoilt = copy.deepcopy(listing)
        spoil(spoilt, rng)
        (tree / JSON).write_text(json.dumps(spoilt))
        try:
            data = open_dataset(tree)
        except Problem as e:
            one_line(e)
            continue
        for reason in data.faults.values():
            one_line(reason)
        assert all(e.text.strip() for e in data)


# eight layouts, one index


def spelt(root, layout, split):
    """The scenes as `layout` tells them:
    for each video (its index) the sentences with their frames and masks."""
    write(root, split, "hard", 2, seed=9, frames=5, size=(48, 72), layout=layout)
    data = open_dataset(root, split)
    assert data.layout == layout and not data.faults and len(data.videos) == 2
    return data, {
        i: [(e.text, e.frame, data.masks(e)) for e in es]
        for i, es in enumerate(data.expressions.values())
    }


@pytest.mark.parametrize(
    "layout,split,like",
    [
        ("ref-davis17", "train", "train"),
        ("mevis", "valid_u", "valid"),
        ("mevis", "train", "train"),
        ("revos", "valid", "valid"),
        ("revos", "train", "train"),
        ("long-rvos", "test", "test"),
        ("a2d-sentences", "test", "test"),
        ("a2d-sentences", "train", "train"),
        ("jhmdb-sentences", "test", "test"),
        ("refcoco", "val", "valid"),
        ("refcoco", "refcoco+_test", "test"),
    ],
)
def test_sentences_and_masks_are_the_same_in_every_layout(tmp_path, layout, split, like):
    (usual, plain), (data, told) = (
        spelt(tmp_path / "plain", "ref-youtube-vos", like),
        spelt(tmp_path / layout, layout, split),
    )
    for i, (video, like) in enumerate(zip(data.videos.values(), usual.videos.values())):
        truth = {text: masks for text, _, masks in plain[i]}
        if layout in ("mevis", "revos"):  # asks for several objects and for none, too
            sentences = data.expressions[video.id]
            count = sum(e.object_id == "none" or "+" in e.object_id for e in sentences)
            sets, told[i] = told[i][-count:], told[i][:-count]
            labels = usual.labels(like.id)
            for e, (_, _, masks) in zip(sentences[-count:], sets):
                objects = [int(o) + 1 for o in e.object_id.split("+") if o != "none"]
                assert layout == "revos" or (len(objects) >= 2) == (e.kind == "several")
                assert (masks == np.isin(labels, objects)).all()
        for text, frame, masks in told[i]:
            assert (
                masks == (truth[text] if frame is None else truth[text][frame : frame + 1])
            ).all()
        asked = {text for text, *_ in told[i]}
        assert (
            len(asked) == 1
            if layout == "jhmdb-sentences"
            else asked == set(truth) or layout in ("a2d-sentences", "refcoco")
        )
        ours, theirs = (next(read_video(v, names=v.frames[:1])).astype(int) for v in (video, like))
        assert abs(ours - theirs).mean() < 8


@pytest.mark.parametrize("split,like", [("grefcoco_val", "valid"), ("grefcoco_train", "train")])
def test_grefcoco_holds_several_and_none(tmp_path, split, like):
    "Its first sentences are those of RefCOCO; the sets are unions of labels, or empty."
    single = spelt(tmp_path / "single", "refcoco", split.replace("grefcoco", "refcoco"))[0]
    data, _ = spelt(tmp_path / "sets", "refcoco", split)
    usual, _ = spelt(tmp_path / "plain", "ref-youtube-vos", like)
    for v, plain in zip(data.videos, usual.videos):
        sentences, alone = data.expressions[v], single.expressions[v]
        assert [e.text for e in sentences[: len(alone)]] == [e.text for e in alone]
        for e, one in zip(sentences, alone):
            assert (data.masks(e) == single.masks(one)).all() and e.kind not in ("several", "none")
        ids = set(np.unique(usual.labels(plain)[0])) - {0}
        rest = sentences[len(alone) :]
        assert rest and {e.kind for e in rest} <= {"several", "none"}
        for e in rest:
            (mask,) = data.masks(e)
            covered = {i for i in ids if mask[usual.labels(plain)[0] == i].all()}
            assert (mask == np.isin(usual.labels(plain)[0], list(covered))).all()
            assert len(covered) >= 2 if e.kind == "several" else not covered
            assert (e.object_id == "none") == (e.kind == "none")
            box = data.truth.box(data.sample_id(e))
            if e.kind == "several":
                y, x = np.nonzero(mask)
                assert box.tolist() == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            else:
                assert box is None


def test_a_lost_annotation_is_a_fault_where_one_is_due(tmp_path):
    "Only gRefCOCO may have any number, and its entry must say that it is gRefCOCO."
    write(tmp_path, "grefcoco_val", "easy", 1, seed=3, frames=2, size=(48, 72), layout="refcoco")
    path = tmp_path / "grefcoco/instances_grefcoco_val.json"
    listing = json.loads(path.read_text())
    assert not open_dataset(tmp_path, "grefcoco_val").faults
    odd = 0
    for image in listing["images"]:
        odd += sum(a["image_id"] == image["id"] for a in listing["annotations"]) != 1
        image["dataset_name"] = "refcocog"
    path.write_text(json.dumps(listing))
    data = open_dataset(tmp_path, "grefcoco_val")
    assert len(data.faults) == odd > 1
    for reason in data.faults.values():
        one_line(reason, "annotations", "one of each")


def read_files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_written_twice_is_the_same_and_other_scenes_are_refused(tmp_path):
    for layout, split in (("mevis", "valid_u"), ("a2d-sentences", "test"), ("refcoco", "val")):
        root = tmp_path / layout
        options = dict(frames=2, size=(48, 72), layout=layout)
        write(root, split, "easy", 1, seed=1, **options)
        first = read_files(root)
        write(root, split, "easy", 1, seed=1, **options)
        assert read_files(root) == first
        with pytest.raises(Problem, match="another folder"):
            write(root, split, "easy", 1, seed=2, **options)
        with pytest.raises(Problem, match="split"):
            write(root, "testB", "easy", 1, seed=1, layout=layout)


# masks as text


def test_run_lengths_are_measured():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, share = tuple(rng.integers(1, 60, 2)), rng.choice([0, 0.02, 0.5, 0.98, 1])
        code = rle_encode(rng.random(size) < share)
        assert (
            count_pixels(code["counts"])
            == count_pixels(code["counts"].decode())
            == size[0] * size[1]
        )
        cut = code["counts"][: rng.integers(0, len(code["counts"]))]
        assert count_pixels(cut) < size[0] * size[1] or not share
    big = np.zeros((3000, 4000), bool)
    big[1500:, 2000:] = True
    assert count_pixels(rle_encode(big)["counts"]) == 12_000_000


def test_codes_that_are_none():
    "Half a code is refused, whatever lies in memory; a polygon out of this world costs no time."
    code = rle_encode(np.eye(40, dtype=bool))
    text = code["counts"].decode()
    for odd in (
        {"size": [40, 40], "counts": text[:-3]},
        {"size": [40, 40], "counts": text + "1"},
        {"size": [40, 40], "counts": "0" * 10**5},
        {"size": [40, 40], "counts": [1599]},
        {"size": [40, 40], "counts": [-1, 1601]},
        {"size": [10**9, 10**9], "counts": text},
        {"size": [40.5, 40], "counts": text},
        {"size": "40", "counts": text},
        [[0, 0, 1e300, 0, 5, 5]],
        [[0, 0, float("inf"), 0, 5, 5]],
        [[0, 0, float("nan"), 0, 5, 5]],
        [["a"] * 6],
        [[0, 0, 1, 1, 2]],
        [{}],
        [[]],
        True,
    ):
        with pytest.raises(Problem) as e:
            read_code(odd, (40, 40), "JSON")
        one_line(e.value, "JSON")
    with pytest.raises(Problem):
        read_code({"size": [10**6, 10**6], "counts": text}, (10**6, 10**6), "JSON")
    for good in ({"size": [40, 40], "counts": text}, {"size": [40.0, 40], "counts": text.encode()}):
        assert (read_code(good, (40, 40), "JSON") == np.eye(40)).all()
    assert (
        read_code(
            [[0, 0, 10, 0, 10, 10, 0, 10], [20, 20, 30, 20, 30, 30, 20, 30]], (40, 40), "JSON"
        ).sum()
        == 200
    )


# RefCOCO


@pytest.fixture
def refcoco(tmp_path):
    write(tmp_path / "refcoco", "val", "easy", 2, seed=3, frames=1, size=(48, 72), layout="refcoco")
    return tmp_path / "refcoco"


def change_coco(root, change):
    path = root / "refcocog/instances_refcocog_val.json"
    listing = json.loads(path.read_text())
    change(listing["images"], listing["annotations"])
    path.write_text(json.dumps(listing))
    return path


def spoil_coco(images, annotations):
    annotations.pop(0)
    annotations.append(dict(annotations[1]))
    images.append(dict(images[3], caption="another"))
    images.append("strange")
    annotations[3]["image_id"] = 999
    images[6]["id"] = True
    annotations[4].pop("segmentation")


def test_coco_entries_without_their_partner_are_named(refcoco):
    before = [e.id for e in open_dataset(refcoco, "")]
    path = change_coco(refcoco, spoil_coco)
    data = open_dataset(refcoco, "")
    told = " ".join(data.faults.values())
    assert (
        {e.id for e in data} == set(before) - {"1", "3", "4", "5", "7"}
        and all(f"id {i}: " in told for i in (1, 3, 4, 5, 7, 999))
        and told.count('"images"') == 2
    )
    for reason in data.faults.values():
        one_line(reason, str(path))
    with pytest.raises(Problem) as e:
        data.masks(next(e for e in data if e.id == "6"))
    one_line(e.value, str(path), "id 6")


def test_a_coco_file_that_was_changed_is_read_again(refcoco):
    e = next(iter(open_dataset(refcoco, "")))
    path = refcoco / "refcocog/instances_refcocog_val.json"
    was = path.stat()
    change_coco(refcoco, lambda images, annotations: images[0].update(caption=e.text.upper()))
    os.utime(
        path, ns=(was.st_atime_ns, was.st_mtime_ns + 1)
    )  # the same size, changed a moment later
    data = open_dataset(refcoco, "")
    assert next(iter(data)).text == e.text.upper() != e.text
    path.unlink()
    with pytest.raises(Problem) as said:
        data.masks(e)
    one_line(said.value, "no such file")


# MeViS


@pytest.fixture
def mevis(tmp_path):
    write(tmp_path / "mevis", "valid_u", "easy", 2, seed=3, frames=3, size=(48, 72), layout="mevis")
    return tmp_path / "mevis"


def change_mevis(root, change, name="meta_expressions.json"):
    path = root / "valid_u" / name
    found = json.loads(path.read_text())
    change(found.get("videos", found))
    path.write_text(json.dumps(found))


TARGETS = [
    {"obj_id": "1", "anno_id": [1]},
    {"obj_id": [1]},
    {"anno_id": [1]},
    {"obj_id": [1, 2], "anno_id": [1]},
    {"obj_id": [None], "anno_id": [1]},
    {"obj_id": [1], "anno_id": ["../1"]},
    {"obj_id": [True], "anno_id": [1]},
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_that_are_no_lists(mevis, targets):
    before = len(open_dataset(mevis, ""))
    change_mevis(
        mevis,
        lambda videos: videos["easy-00000"]["expressions"].update(
            {"0": dict(exp="a dog", **targets)}
        ),
    )
    data = open_dataset(mevis, "")
    assert list(data.faults) == ["easy-00000/0"] and len(data) == before - 1
    one_line(data.faults["easy-00000/0"], "easy-00000", "expression 0")


def test_hidden_targets_give_none(mevis):
    def hide(videos):
        for e in videos["easy-00000"]["expressions"].values():
            del e["obj_id"], e["anno_id"]

    change_mevis(mevis, hide)
    data = open_dataset(mevis, "")
    assert all((data.masks(e) is None) == (e.video == "easy-00000") for e in data)
    (mevis / "valid_u/mask_dict.json").unlink()
    e = data.expressions["easy-00001"][0]
    with pytest.raises(Problem) as said:
        data.masks(e)
    one_line(said.value, "no such file", "mask_dict.json")


@pytest.mark.parametrize("damage", ["short", "size", "counts", "unknown", "cut", "empty", "text"])
def test_a_bad_annotation_is_named_when_read(mevis, damage):
    path = mevis / "valid_u/mask_dict.json"
    data = open_dataset(mevis, "")
    e = next(e for e in data.expressions["easy-00001"] if e.kind == "several")
    last = data.union.annotation_ids[e.video, e.id][-1]

    def change(found):
        if damage == "short":
            found[last].pop()
        if damage == "size":
            found[last][0]["size"] = [72, 48]
        if damage == "counts":
            found[last][0] = {"size": [48, 72]}
        if damage == "unknown":
            del found[last]
        if damage == "text":
            found[last] = "lost"

    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        change_mevis(mevis, change, "mask_dict.json")
    with pytest.raises(Problem) as said:
        data.masks(e)
    one_line(said.value, str(path))
    if damage != "empty":
        assert data.masks(data.expressions["easy-00000"][0]).any()


def test_annotations_given_twice_or_cut_off(mevis):
    path = mevis / "valid_u/mask_dict.json"
    text = path.read_text().strip()
    path.write_text(text[:-1] + ', "0": [null, null, null]}')
    with pytest.raises(Problem) as said:
        read_annotation(path, "0")
    one_line(said.value, str(path), "annotation 0", "twice")
    assert read_annotation(path, "1") == json.loads(text)["1"]
    path.write_text(text[:-1])
    last = list(json.loads(text))[-1]
    with pytest.raises(Problem) as said:
        read_annotation(path, last)
    one_line(said.value, "cut off")


def test_predicting_on_mevis(mevis, tmp_path):
    from rvos_nb.protocols import run_protocol

    report, _ = run_protocol(mevis, tmp_path / "out", "referformer-tiny")
    data = open_dataset(mevis, "")
    assert not report.failed and all(
        len(list((tmp_path / f"out/Annotations/{e.video}/{e.id}").glob("*.png"))) == 3 for e in data
    )
