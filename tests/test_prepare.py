"""What a check finds in trees that are whole, hurt or strange;
conversions of originals; and what the commands say."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from helpers import spoil

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.check import check_dataset
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.prepare import JHMDB_SEED, draw_jhmdb, prepare
from rvos_nb.data.prepare_videos import DAVIS_TEXTS, Conversion
from rvos_nb.data.refshapes import LAYOUT_SPLITS, write
from rvos_nb.data.samples import JHMDB_LISTS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for layout, splits in LAYOUT_SPLITS.items():
        for split in splits:
            write(root / layout, split, "easy", 2, seed=8, frames=3, size=(48, 72), layout=layout)
    return root


@pytest.fixture
def tree(whole, tmp_path):
    return lambda name: shutil.copytree(whole / name, tmp_path / name)


def command(root, capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(["data", *(argv or ["check"]), str(root)])
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize("layout", LAYOUT_SPLITS)
def test_whole_trees(whole, capsys, layout):
    code, said = command(whole / layout, capsys)
    assert (
        code == 0
        and f"layout: {layout}\n" in said.out
        and "all is there" in said.out
        and said.err == ""
    )
    survey = check_dataset(whole / layout)
    assert len(survey.counts) == len(LAYOUT_SPLITS[layout]) and all(
        n["videos"] == 2 and min(n.values()) > 0 for n in survey.counts.values()
    )


LOSSES = {
    "ref-youtube-vos": [
        "train/JPEGImages/easy-00000/00005.jpg",
        "valid/Annotations/easy-00001/00005.png",
        "test/JPEGImages/test-easy-00000",
    ],
    "ref-davis17": ["valid/JPEGImages/easy-00000", "train/Annotations/easy-00000/00000.png"],
    "mevis": ["valid_u/mask_dict.json", "train/JPEGImages/easy-00000/00002.jpg"],
    "revos": ["mask_dict.json", "JPEGImages/valid/easy-00000/00002.jpg"],
    "long-rvos": ["train/Annotations/easy-00000/0", "valid/JPEGImages/easy-00001/00000.jpg"],
    "a2d-sentences": [
        "Release/clips320H/easy-00000.mp4",
        "text_annotations/a2d_annotation_with_instances/easy-00001/00001.h5",
    ],
    "jhmdb-sentences": [
        "puppet_mask/easy/test-easy-00000/puppet_mask.mat",
        "Rename_Images/easy/test-easy-00001/00001.png",
    ],
    "refcoco": ["train2014/COCO_train2014_000000000001.jpg"],
}


@pytest.mark.parametrize("layout,lost", [(k, p) for k, ps in LOSSES.items() for p in ps])
def test_what_is_lost_is_named(tree, capsys, layout, lost):
    root = tree(layout)
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, said = command(root, capsys)
    named = (
        path.parent if path.suffix in (".jpg", ".png") and layout != "refcoco" else path
    )  # of frames and masks the folder is named
    assert (
        code == 1
        and str(named) in said.out
        and "expected" in said.out
        and "all is there" not in said.out
        and said.err == ""
    )
    assert path.stem in said.out


def test_lists_that_cannot_be_read(tree, capsys):
    for name, path in (
        ("ref-youtube-vos", "meta_expressions/valid/meta_expressions.json"),
        ("mevis", "train/meta_expressions.json"),
        ("jhmdb-sentences", "jhmdb_sentences_samples_metadata.json"),
    ):
        root = tree(name)
        (root / path).write_text('{"half')
        code, said = command(root, capsys)
        assert code == 1 and "not JSON" in said.out and path in said.out


def test_faults_of_the_lists_are_told(tree, capsys):
    root = tree("mevis")
    path = root / "train/meta_expressions.json"
    listing = json.loads(path.read_text())
    listing["videos"]["easy-00000"]["expressions"]["0"]["exp"] = ""
    path.write_text(json.dumps(listing))
    code, said = command(root, capsys)
    assert code == 1 and "train: 1 missing or odd" in said.out and "easy-00000/0" in said.out


@pytest.mark.parametrize("layout", LAYOUT_SPLITS)
def test_what_is_opened_is_counted(whole, layout):
    survey = check_dataset(whole / layout)
    for split, found in survey.counts.items():
        assert survey.opened[split]["masks"] == found["masks"] and survey.opened[split][
            "frames"
        ] == (0 if layout == "a2d-sentences" else found["frames"])


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def garbage(path):
    path.write_bytes(b"garbage")


INSIDE = {
    "ref-youtube-vos": [
        "valid/JPEGImages/easy-00000/00005.jpg",
        "train/Annotations/easy-00001/00010.png",
    ],
    "ref-davis17": [
        "train/JPEGImages/easy-00001/00002.jpg",
        "valid/Annotations/easy-00000/00002.png",
    ],
    "mevis": ["valid_u/mask_dict.json", "train/JPEGImages/easy-00000/00002.jpg"],
    "a2d-sentences": [
        "text_annotations/a2d_annotation_with_instances/easy-00001/00002.h5",
        "Release/clips320H/easy-00000.mp4",
    ],
    "jhmdb-sentences": [
        "puppet_mask/easy/test-easy-00001/puppet_mask.mat",
        "Rename_Images/easy/test-easy-00000/00002.png",
    ],
    "refcoco": [
        "train2014/COCO_train2014_000000000001.jpg",
        "refcocog/instances_refcocog_val.json",
    ],
}


@pytest.mark.parametrize("damage", [cut, garbage])
@pytest.mark.parametrize("layout,file", [(k, p) for k, ps in INSIDE.items() for p in ps])
def test_files_are_looked_into(tree, capsys, layout, file, damage):
    root = tree(layout)
    damage(root / file)
    code, said = command(root, capsys)
    assert code == 1 and file in said.out and "missing or odd" in said.out and said.err == ""


def put_segmentation(listing, value):
    listing["annotations"][1]["segmentation"] = value


def put_code(listing, value):
    listing["1"][1] = value


def test_masks_are_looked_into(tree, capsys):
    """A code that is none, a short one, one for a picture of another size, no polygon;
    in both layouts that keep masks in JSON."""
    for odd in (
        None,
        7,
        [],
        [[1, 2, 3]],
        [[0, 0, 1e12, 0, 5, 5]],
        {"size": [48, 72]},
        {"size": [48, 72], "counts": ""},
        {"size": [48, 72], "counts": "garbage"},
        {"size": [72, 48], "counts": [3456]},
        {"size": [48, 72], "counts": [3455]},
    ):
        for layout, file, put in (
            ("refcoco", "refcocog/instances_refcocog_val.json", put_segmentation),
            ("mevis", "valid_u/mask_dict.json", put_code),
        ):
            if layout == "mevis" and odd is None:
                continue  # the object is absent there
            root = tree(layout)
            listing = json.loads((root / file).read_text())
            put(listing, odd)
            (root / file).write_text(json.dumps(listing))
            code, said = command(root, capsys)
            assert code == 1 and file in said.out and said.out.count("missing or odd") == 1, (
                layout,
                odd,
                said.out,
            )
            shutil.rmtree(root)


def test_masks_of_other_sizes_than_the_pictures(tree, capsys):
    from PIL import Image

    for layout, file in (
        ("refcoco", "train2014/COCO_train2014_000000000001.jpg"),
        ("jhmdb-sentences", "Rename_Images/easy/test-easy-00000/00001.png"),
        ("mevis", "valid_u/JPEGImages/easy-00000/00000.jpg"),
    ):
        root = tree(layout)
        Image.new("RGB", (30, 20)).save(root / file)
        code, said = command(root, capsys)
        assert code == 1 and "20x30" in said.out and "48x72" in said.out


def test_every_split_has_a_name_in_the_table(tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = command(tmp_path / "empty", capsys, "check", "--layout", "mevis")
    assert code == 1 and "the whole tree: 1 missing or odd" in said.out and "no split" in said.out
    code, said = command(tmp_path / "nowhere", capsys, "check", "--layout", "mevis")
    assert code == 1 and "no such folder" in said.err


def test_empty_lists(tree, capsys):
    for layout, file, text in (
        ("ref-youtube-vos", "meta_expressions/test/meta_expressions.json", '{"videos": {}}'),
        ("mevis", "test/meta_expressions.json", '{"videos": {}}'),
        ("a2d-sentences", "a2d_sentences_single_frame_test_annotations.json", "[]"),
        ("jhmdb-sentences", "jhmdb_sentences_samples_metadata.json", "[]"),
        ("refcoco", "refcocog/instances_refcocog_test.json", '{"images": [], "annotations": []}'),
    ):
        root = tree(layout)
        (root / file).write_text(text)
        code, said = command(root, capsys)
        assert (
            code == 1
            and file in said.out
            and "another split" not in said.out
            and said.out.count("missing or odd") == 1
        ), said.out


def test_both_versions_of_mevis_are_known(tree):
    root = tree("mevis")
    [p.unlink() for p in root.glob("refshapes_*.json")]
    path = root / "valid_u/meta_expressions.json"
    listing = json.loads(path.read_text())
    said = listing["videos"]["easy-00000"]["expressions"]
    others = len(listing["videos"]["easy-00001"]["expressions"])
    for n, right in ((793, True), (907, True), (800, False)):
        listing["videos"]["easy-00000"]["expressions"] = {
            str(k): said["0"] for k in range(n - others)
        }
        path.write_text(json.dumps(listing))
        told = [
            why
            for split, _, why in check_dataset(root).faults
            if split == "valid_u" and "expressions" in why
        ]
        assert (not told) == right and all("793 or 907" in why for why in told)


def test_originals_are_pointed_to_their_conversion(tmp_path, capsys):
    (tmp_path / "davis_text_annotations").mkdir()
    code, said = command(tmp_path, capsys)
    assert code == 1 and "rvos data prepare ref-davis17" in said.err


@pytest.mark.parametrize("layout", LAYOUT_SPLITS)
def test_fuzzed_lists_give_lines_and_no_tracebacks(whole, layout, tmp_path):
    "Replace one value of a list at a time by something odd; all else is linked."
    rng, root = np.random.default_rng(1), tmp_path / layout
    shutil.copytree(whole / layout, root, copy_function=os.link)
    lists = [
        p
        for p in (whole / layout).rglob("*.json")
        if "refshapes" not in p.name and p.name != "meta.json"
    ]
    for n in range(40):
        path = lists[n % len(lists)]
        here, spoilt = root / path.relative_to(whole / layout), json.loads(path.read_text())
        spoil(spoilt, rng, 0.2)
        here.unlink()
        here.write_text(json.dumps(spoilt))
        survey = check_dataset(root, layout)
        assert survey.table() and all(
            "\n" not in why and len(why) < 2000 for *_, why in survey.faults
        )
        here.unlink()
        os.link(path, here)
    assert check_dataset(root, layout).faults == []


# conversions


def files(root):
    return {
        str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() or p.is_symlink()
    }


@pytest.fixture
def davis(tree, tmp_path):
    "Ref-DAVIS17 in its original archives, made out of the converted tree; and that tree."
    known, root = tree("ref-davis17"), tmp_path / "original" / "davis"
    lines = {t: [] for t in DAVIS_TEXTS}
    for split, name in (("train", "train"), ("valid", "val")):
        listing = json.loads(
            (known / f"meta_expressions/{split}/meta_expressions.json").read_text()
        )["videos"]
        (root / "DAVIS/ImageSets/2017").mkdir(parents=True, exist_ok=True)
        (root / f"DAVIS/ImageSets/2017/{name}.txt").write_text(
            "".join(f"{split}-{v}\n" for v in listing)
        )
        for v, entry in listing.items():
            for kind, to in (
                ("JPEGImages", "JPEGImages"),
                ("Annotations", "Annotations_unsupervised"),
            ):
                shutil.copytree(known / split / kind / v, root / f"DAVIS/{to}/480p/{split}-{v}")
            for k, e in entry["expressions"].items():
                lines[DAVIS_TEXTS[int(k) % 4]].append(f'{split}-{v} {e["obj_id"]} "{e["exp"]}"')
    (root / "davis_text_annotations").mkdir()
    for i, t in enumerate(DAVIS_TEXTS):
        (root / f"davis_text_annotations/{t}.txt").write_bytes(
            "\n".join(reversed(lines[t])).encode(("utf-8", "latin-1")[i // 2])
        )
    return root, known


def test_davis_from_the_archives(davis, capsys):
    root, known = davis
    originals = files(root)
    first = None
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "ref-davis17")
        assert code == 0 and said.err == "" and said.out.count("2 videos") == 2
        after = files(root)
        first = first or after
        assert after == first and {k: v for k, v in after.items() if k in originals} == originals
    for split in ("train", "valid"):
        ours, theirs = open_dataset(root, split), open_dataset(known, split)
        assert (
            ours.layout == "ref-davis17"
            and not ours.faults
            and [(e.id, e.text, e.object_id) for e in ours]
            == [(e.id, e.text, e.object_id) for e in theirs]
        )
        assert all((ours.masks(a) == theirs.masks(b)).all() for a, b in zip(ours, theirs))
    shutil.move(root, root.with_name("moved"))  # links are relative
    assert (
        open_dataset(root.with_name("moved"), layout="ref-davis17")
        .masks(next(iter(open_dataset(root.with_name("moved")))))
        .any()
    )


def test_davis_without_a_text(davis, capsys):
    root, _ = davis
    for path in (
        root / f"davis_text_annotations/{DAVIS_TEXTS[2]}.txt",
        root / "DAVIS/ImageSets/2017/val.txt",
    ):
        path.unlink()
        code, said = command(root, capsys, "prepare", "ref-davis17")
        assert (
            code == 1
            and "unpack" in said.err
            and str(path) in said.err
            and said.err.count("\n") == 1
        )


def test_davis_lines_that_are_odd_cost_themselves(davis, capsys):
    root, known = davis
    text = root / f"davis_text_annotations/{DAVIS_TEXTS[2]}.txt"
    whole = text.read_bytes()
    odd = [
        "a dog",
        'valid-easy-00000 1 ""',
        'valid-easy-00000 1 "again"',
        'valid-easy-00000 0 "it"',
        'nobody 1 "it"',
        '../x 1 "it"',
    ]
    text.write_bytes(whole + "\n".join(["", *odd, ""]).encode())
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert (
        code == 1
        and said.out.count("left out: ") == 6
        and said.out.count(f"{text}, line ") == 6
        and said.out.count("2 videos") == 2
    )
    assert [e.text for e in open_dataset(root, "valid")] == [
        e.text for e in open_dataset(known, "valid")
    ]
    text.write_bytes(b"nothing\n")
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert code == 1 and said.out.count("no usable video") == 2 and f"{text}, line 1" in said.out
    text.write_bytes(whole[: whole.index(b" ")] + b' 1 "caf\x85"\n')
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert f"{text}, line" not in said.out  # a character of Latin-1 that ends no line


def test_davis_categories(davis, capsys):
    root, _ = davis
    path = root / "DAVIS/davis_semantics.json"
    videos = ["valid-easy-00000", "valid-easy-00001", "train-easy-00000", "train-easy-00001"]
    path.write_text(json.dumps({v: {"1": "dog", "2": "cat"} for v in videos}))
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "ref-davis17")
        assert code == 0 and json.loads((root / "valid/meta.json").read_text()) == {
            "videos": {
                v: {"objects": {"1": {"category": "dog"}, "2": {"category": "cat"}}}
                for v in videos[:2]
            }
        }
    assert (
        check_dataset(root).layout == "ref-davis17"
        and "meta.json" not in check_dataset(root).table()
    )
    for text in (
        '{"half',
        "[]",
        json.dumps(dict.fromkeys(videos, "dog")),
        json.dumps({v: {"1": 7} for v in videos}),
        "{}",
    ):
        path.write_text(text)
        (root / "valid/meta.json").unlink(missing_ok=True)
        code, said = command(root, capsys, "prepare", "ref-davis17")
        assert (
            code == 1
            and str(path) in said.out
            and said.out.count("2 videos") == 2
            and said.err == ""
        )


def test_what_lies_where_a_link_belongs(davis, capsys):
    root, _ = davis
    place = root / "valid/JPEGImages/valid-easy-00000"
    place.mkdir(parents=True)
    (place / "00000.jpg").touch()
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert (
        code == 1
        and "left out: " in said.out
        and str(place) in said.out
        and "other files" in said.out
        and "1 videos" in said.out
        and os.listdir(place) == ["00000.jpg"]
    )
    shutil.rmtree(place)
    shutil.copytree(root / "DAVIS/JPEGImages/480p/valid-easy-00000", place)
    (root / "meta_expressions/valid/meta_expressions.json").unlink()
    code, said = command(
        root, capsys, "prepare", "ref-davis17"
    )  # a copy of the same, as where links are not possible
    assert code == 0 and not place.is_symlink()
    shutil.rmtree(root / "train")
    (root / "train").touch()
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert code == 1 and said.out.count("no folder can be made") == 2 and said.err == ""


def test_davis_videos_that_are_odd(davis, capsys):
    root, _ = davis
    text = root / f"davis_text_annotations/{DAVIS_TEXTS[1]}.txt"
    text.write_text(
        "\n".join(
            x for x in text.read_text().splitlines() if not x.startswith("valid-easy-00000 1 ")
        )
    )
    shutil.rmtree(root / "DAVIS/JPEGImages/480p/train-easy-00001")
    code, said = command(root, capsys, "prepare", "ref-davis17")
    assert (
        code == 1
        and said.out.count("left out: ") == 2
        and said.out.count("1 videos") == 2
        and "the same objects" in said.out
    )


def refer(root, name="refcocog", by="umd"):
    "The toolkit's two files, out of the converted lists, which are removed."
    images, annotations, refs = {}, [], []
    for path in sorted((root / name).glob(f"instances_{name}_*.json")):
        made = json.loads(path.read_text())
        path.unlink()
        for i, a in zip(made["images"], made["annotations"]):
            images[i["original_id"]] = i | {"id": i["original_id"]}
            annotations.append(a | {"id": len(annotations) + 500, "image_id": i["original_id"]})
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": annotations[-1]["id"],
                    "image_id": i["original_id"],
                    "split": path.stem.split("_")[-1],
                    "sentences": [
                        {
                            "sent": i["caption"],
                            "raw": i["caption"].upper(),
                            "tokens": i["caption"].split(),
                        }
                    ],
                }
            )
    (root / name / "instances.json").write_text(
        json.dumps(
            {
                "images": list(images.values()),
                "annotations": annotations,
                "categories": [{"id": 1, "name": "thing"}],
            }
        )
    )
    (root / name / f"refs({by}).p").write_bytes(pickle.dumps(refs, 0))
    return refs, annotations


def test_refcoco_from_the_toolkit(tree, whole, capsys):
    root = tree("refcoco")
    refer(root)
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "refcoco")
        assert code == 0 and said.out.count("sentences") == 3
    for split in ("train", "val", "test"):
        ours, theirs = open_dataset(root, split), open_dataset(whole / "refcoco", split)
        assert (
            not ours.faults
            and [(e.id, e.text, e.video) for e in ours] == [(e.id, e.text, e.video) for e in theirs]
            and all((ours.masks(a) == theirs.masks(b)).all() for a, b in zip(ours, theirs))
        )
    assert check_dataset(root).faults == []


def gather_references(root):
    "The two files of gRefCOCO, out of the converted lists, which are removed."
    refs, annotations, images = [], [], {}
    for path in sorted((root / "grefcoco").glob("instances_grefcoco_*.json")):
        made = json.loads(path.read_text())
        path.unlink()
        for i in made["images"]:
            images[i["original_id"]] = i | {"id": i["original_id"]}
            own = [a for a in made["annotations"] if a["image_id"] == i["id"]]
            ids = [len(annotations) + 500 + n for n in range(len(own))]
            annotations += [a | {"id": n, "image_id": i["original_id"]} for a, n in zip(own, ids)]
            ref = {"ref_id": len(refs), "ann_id": ids or [-1], "image_id": i["original_id"]}
            ref |= {"split": path.stem.split("_")[-1], "no_target": not ids}
            refs.append(ref | {"sentences": [{"sent": i["caption"]}]})
    coco = {"images": list(images.values()), "annotations": annotations, "categories": []}
    (root / "grefcoco/instances.json").write_text(json.dumps(coco))
    return refs


@pytest.mark.parametrize("suffix", ["json", "p"])
def test_grefcoco_from_its_files(tmp_path, capsys, suffix):
    for split in ("grefcoco_train", "grefcoco_val"):
        write(tmp_path, split, "easy", 2, seed=8, frames=2, size=(48, 72), layout="refcoco")
    before = open_dataset(tmp_path, "grefcoco_val")
    masks = [before.masks(e) for e in before]
    refs = gather_references(tmp_path)
    path = tmp_path / f"grefcoco/grefs(unc).{suffix}"
    path.write_bytes(json.dumps(refs).encode() if suffix == "json" else pickle.dumps(refs, 2))
    for _ in range(2):
        code, said = command(tmp_path, capsys, "prepare", "refcoco")
        assert code == 0 and said.out.count("sentences") == 2
    data = open_dataset(tmp_path, "grefcoco_val")
    assert not data.faults and [e.text for e in data] == [e.text for e in before]
    assert all((data.masks(e) == m).all() for e, m in zip(data, masks))
    assert {e.kind for e in data if e.object_id == "none"} == {"none"}
    assert {e.kind for e in data} == {"one", "several", "none"}
    assert check_dataset(tmp_path).faults == []


def test_refcoco_entries_that_are_odd(tree, capsys):
    root = tree("refcoco")
    refs, annotations = refer(root)
    refs[0]["ann_id"] = 7
    del refs[1]["split"]
    refs[2] = None
    refs[3]["split"] = "../x"
    (root / "refcocog/refs(umd).p").write_bytes(pickle.dumps(refs, 2))
    code, said = command(root, capsys, "prepare", "refcoco")
    assert code == 1 and said.out.count("left out: ") == 4 and said.err == ""
    refs[:4] = [
        dict(refs[4], ref_id=99, sentences=s)
        for s in ([{"sent": ""}], [{"raw": "it"}], "it", [{"sent": 7}])
    ]
    refs.append(refs[5])
    del annotations[6]["bbox"]
    (root / "refcocog/instances.json").write_text(
        json.dumps(
            json.loads((root / "refcocog/instances.json").read_text())
            | {"annotations": annotations + annotations[-1:]}
        )
    )
    (root / "refcocog/refs(umd).p").write_bytes(pickle.dumps(refs, 2))
    [p.unlink() for p in (root / "refcocog").glob("instances_refcocog_*.json")]
    code, said = command(root, capsys, "prepare", "refcoco")
    assert (
        code == 1
        and said.out.count("left out: ") == 7
        and "entry 6" in said.out
        and "twice" in said.out
        and "again" in said.out
        and said.err == ""
    )
    assert check_dataset(root).faults == []  # each sentence that was written has its mask


class Calls:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_runs_nothing(tree, tmp_path, capsys):
    root = tree("refcoco")
    refer(root)
    for protocol in range(6):
        (root / "refcocog/refs(umd).p").write_bytes(
            pickle.dumps([Calls(str(tmp_path / "called"))], protocol)
        )
        code, said = command(root, capsys, "prepare", "refcoco")
        assert (
            code == 1
            and "plain data" in said.out
            and said.out.count("\n") == 1
            and said.err == ""
            and not (tmp_path / "called").exists()
        )
    shutil.copytree(root / "refcocog", root / "refcoco")
    refer(root)  # the bad one does not keep the good one from being converted
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Calls(str(tmp_path / "called"))]))
    code, said = command(root, capsys, "prepare", "refcoco")
    assert code == 1 and said.out.count("left out: ") == 1 and not (tmp_path / "called").exists()


def test_lists_that_lie_there_are_kept(tree, capsys):
    root = tree("refcoco")
    refer(root)
    path = root / "refcocog/instances_refcocog_val.json"
    path.write_text("[]")
    code, said = command(root, capsys, "prepare", "refcoco")
    assert (
        code == 1
        and "another list" in said.out
        and path.read_text() == "[]"
        and said.out.count(" sentences\n") == 2
    )


def test_an_older_list_hides_nothing(tree, capsys):
    root = tree("jhmdb-sentences")
    texts = jhmdb(root)
    assert command(root, capsys, "prepare", "jhmdb-sentences")[0] == 0
    older = (root / JHMDB_LISTS[1]).read_bytes()
    (root / "jhmdb_annotation.txt").write_text(
        "video_id,query\n"
        + "\n".join(f"{v},{t}" for v, t in list(texts.items())[:1])
        + "\nnobody,it\n../x,it\n"
    )
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert (
        code == 1
        and "line 3" in said.out
        and "line 4" in said.out
        and "another list" in said.out
        and said.out.count("left out: ") == 3
        and (root / JHMDB_LISTS[1]).read_bytes() == older
    )


def a2d(root):
    "The originals of A2D, out of the published lists, which are removed; the lists as they were."
    lists = {p.name: json.loads(p.read_text()) for p in root.glob("a2d_sentences_*.json")}
    [(root / n).unlink() for n in lists]
    said = {(f, o): t for n, rows in lists.items() if "single" in n for t, f, _, o in rows}
    (root / "Release/videoset.csv").write_text(
        "".join(
            f"{v},21,0,1,48,72,4,3,{int('test' in v)}\n" for v in dict.fromkeys(f for f, _ in said)
        )
    )
    (root / "text_annotations/a2d_annotation.txt").write_text(
        "video_id,instance_id,query\n" + "".join(f'{v},{o},"{t}"\n' for (v, o), t in said.items())
    )
    return lists


A2D = "text_annotations/a2d_annotation.txt"
BAD_ROWS = {
    "id": "../x,1,it",
    "absolute": "/etc,1,it",
    "nobody": "nobody,1,it",
    "instance": "easy-00000,one,it",
    "zero": "easy-00000,0,it",
    "short": "easy-00000,1",
    "empty": 'easy-00000,99,""',
    "twice": 'easy-00000,1,"again"',
    "open": 'easy-00000,x,"never closed',
    "long": "easy-00000,98," + "a" * 200_000,
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_a2d_rows_that_are_odd_cost_themselves(tree, capsys, row):
    root = tree("a2d-sentences")
    lists = a2d(root)
    text = root / A2D
    first, rest = text.read_text().split("\n", 1)
    text.write_text("\n".join([first, *rest.splitlines()[:1], row, *rest.splitlines()[1:]]) + "\n")
    where = [
        n
        for n, line in enumerate(text.read_text().splitlines(), 1)
        if line in (row, rest.splitlines()[0])
    ]
    code, said = command(root, capsys, "prepare", "a2d-sentences")
    assert (
        code == 1
        and said.out.count("left out: ") == 1
        and any(f"{text}, line {n}:" in said.out for n in where)
        and said.err == ""
        and len(said.out) < 3000
    )
    again = {n: json.loads((root / n).read_text()) for n in lists}
    assert (
        all(sorted(map(str, again[n])) == sorted(map(str, lists[n])) for n in lists)
        and check_dataset(root).faults == []
    )


def test_a2d_originals_that_are_odd(tree, capsys):
    root = tree("a2d-sentences")
    lists = a2d(root)
    texts = root / "text_annotations"
    (texts / "a2d_missed_videos.txt").write_text("lost\n")
    (root / A2D).write_text(
        (root / A2D).read_text().replace("video_id,instance_id,query\n", "")
        + 'easy-00000,1 (copy),"it"\nlost,1,"it"\neasy-00000,77,"it"\n'
    )
    code, said = command(root, capsys, "prepare", "a2d-sentences")  # without a header
    assert code == 0 and {n: len(json.loads((root / n).read_text())) for n in lists} == {
        n: len(rows) for n, rows in lists.items()
    }
    [(root / n).unlink() for n in lists]
    shutil.rmtree(texts / "a2d_annotation_with_instances/test-easy-00000")
    garbage(texts / "a2d_annotation_with_instances/easy-00000/00001.h5")
    with open(root / "Release/videoset.csv", "a") as f:
        f.write("easy-00000,21,0,1,48,72,4,3,1\nshort\n")
    code, said = command(root, capsys, "prepare", "a2d-sentences")
    assert (
        code == 1
        and said.out.count("left out: ") == 4
        and all(w in said.out for w in ("no annotated frame", "00001.h5", "line 5", "line 6"))
        and check_dataset(root).faults == []
    )
    (root / A2D).write_text("video_id,instance_id,query\n")
    [(root / n).unlink() for n in lists]
    code, said = command(root, capsys, "prepare", "a2d-sentences")
    assert (
        code == 1
        and "no usable sentence" in said.err
        and not any((root / n).exists() for n in lists)
    )


def jhmdb(root, lines=None):
    "The archive's sentences, out of the published list, which is removed."
    path = root / JHMDB_LISTS[0]
    texts = {v: t for v, *_, t in json.loads(path.read_text())}
    path.unlink()
    (root / "jhmdb_annotation.txt").write_text(
        "video_id,query\n" + "\n".join(lines or [f'{v},"{t}"' for v, t in texts.items()]) + "\n"
    )
    return texts


def longer(root, video, frames, masks):
    "A video with more pictures and masks."
    from scipy.io import savemat

    folder = next(root.glob(f"Rename_Images/*/{video}"))
    for t in range(1, frames + 1):
        (folder / f"{t:05d}.png").exists() or shutil.copy(
            folder / "00001.png", folder / f"{t:05d}.png"
        )
    savemat(
        root / f"puppet_mask/{folder.parent.name}/{video}/puppet_mask.mat",
        {"part_mask": np.arange(1, masks + 1, dtype=np.uint8) * np.ones((48, 72, 1), np.uint8)},
    )


def test_jhmdb_from_the_archive(tree, capsys):
    root = tree("jhmdb-sentences")
    texts = jhmdb(root)
    longer(root, "test-easy-00000", 40, 25)
    longer(root, "test-easy-00001", 9, 1)
    originals = files(root)
    first = None
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "jhmdb-sentences")
        assert (
            code == 0
            and said.err == ""
            and "4 samples" in said.out
            and f"seed {JHMDB_SEED}" in said.out
        )
        after = files(root)
        first = first or after
        assert (
            after == first
            and {k: v for k, v in after.items() if k in originals} == originals
            and set(after) - set(originals) == {JHMDB_LISTS[1]}
        )
    data = open_dataset(root, "test")
    assert (
        data.layout == "jhmdb-sentences"
        and not data.faults
        and {e.video: e.text for e in data} == texts
        and {v: len(x.frames) for v, x in data.videos.items()}
        == {"test-easy-00000": 25, "test-easy-00001": 1}
    )
    asked = [e.frame for e in data.expressions["test-easy-00000"]]
    assert (
        len(asked) == 3
        and asked == sorted({*asked})
        and 0 <= asked[0] <= asked[-1] < 25
        and all(data.masks(e).all() for e in data)
    )
    assert check_dataset(root).faults == [] and check_dataset(root).counts["test"] == {
        "videos": 2,
        "expressions": 4,
        "frames": 26,
        "masks": 4,
    }


def test_the_draw_of_jhmdb_depends_on_names_only(tree):
    root = tree("jhmdb-sentences")
    texts = jhmdb(root)
    longer(root, "test-easy-00000", 40, 40)
    longer(root, "test-easy-00001", 40, 40)
    one = draw_jhmdb(root, Conversion())
    (root / "jhmdb_annotation.txt").write_text(
        "video_id,query\n" + "\n".join(f"{v},{t}" for v, t in reversed(texts.items()))
    )
    two = draw_jhmdb(root, Conversion())
    assert (
        one != two
        and sorted(one) == sorted(two)
        and [r[1] for r in one[:3]] != [r[1].replace("00001/", "00000/") for r in one[3:]]
    )
    (root / "jhmdb_annotation.txt").write_text("video_id,query\ntest-easy-00001,another\n")
    assert [r[:4] for r in draw_jhmdb(root, Conversion())] == [
        r[:4] for r in one if r[0] == "test-easy-00001"
    ]


def test_jhmdb_published_samples_go_first(tree, capsys):
    root = tree("jhmdb-sentences")
    published, ours = (root / n for n in JHMDB_LISTS)
    originals = files(root)
    known = [(e.video, e.id, e.text) for e in open_dataset(root, "test")]
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "jhmdb-sentences")
        assert (
            code == 0
            and "with paths from this folder" in said.out
            and {k: v for k, v in files(root).items() if k != ours.name} == originals
        )
    rows = json.loads(ours.read_text())
    assert all((root / p).exists() for r in rows for p in r[1:3]) and [
        (r[0], r[3:]) for r in rows
    ] == [(r[0], r[3:]) for r in json.loads(published.read_text())]
    published.unlink()
    assert [(e.video, e.id, e.text) for e in open_dataset(root, "test")] == known
    ours.rename(published)  # its paths need no other list
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert code == 0 and "as they are" in said.out and not ours.exists()
    rows[1][1] = "somewhere"
    rows[2] = rows[2][:3]
    rows[3][1] = "/data/Rename_Images/../test-easy-00000/00001.png"
    published.write_text(json.dumps(rows))
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert (
        code == 1
        and said.out.count("left out: ") == 3
        and all(f"entry {n}" in said.out for n in (1, 2, 3))
    )


def test_jhmdb_lines_and_masks_that_are_odd(tree, capsys):
    root = tree("jhmdb-sentences")
    texts = jhmdb(
        root,
        [
            "test-easy-00000,it runs",
            "test-easy-00000,again",
            "nobody,it",
            "test-easy-00001,it",
            "../x,it",
            "test-easy-00001",
        ],
    )
    mask = next(root.glob("puppet_mask/*/test-easy-00001/puppet_mask.mat"))
    mask.write_bytes(b"no Matlab")
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert (
        code == 1
        and said.out.count("left out: ") == 5
        and "cannot be read" in said.out
        and "line 3" in said.out
        and said.err == ""
        and len(texts) == 2
    )
    other = root / "Rename_Images/jump/test-easy-00000"
    shutil.copytree(next(root.glob("Rename_Images/*/test-easy-00000")), other)
    (root / JHMDB_LISTS[1]).unlink()
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert code == 1 and "the folder test-easy-00000 twice" in said.err
    shutil.rmtree(other.parent)
    mask.unlink()
    shutil.rmtree(next(root.glob("puppet_mask/*/test-easy-00000")))
    code, said = command(root, capsys, "prepare", "jhmdb-sentences")
    assert (
        code == 1
        and "no usable sentence" in said.err
        and said.err.count("\n") == 1
        and not (root / JHMDB_LISTS[1]).exists()
    )


def test_ytvos_for_uninext(tree, capsys):
    root = tree("ref-youtube-vos")
    originals = files(root)
    first = None
    for _ in range(2):
        code, said = command(root, capsys, "prepare", "ref-youtube-vos")
        assert code == 0 and said.err == ""
        after = files(root)
        first = first or after
        assert after == first
        assert {k: v for k, v in after.items() if k not in ("valid.json", "test.json")} == originals
    for split in ("valid", "test"):
        made, data = json.loads((root / f"{split}.json").read_text()), open_dataset(root, split)
        assert set(made) == {"videos", "categories"} and [
            (c["id"], c["name"]) for c in made["categories"]
        ] == [(1, "object")]
        assert [v["id"] for v in made["videos"]] == list(range(1, len(data) + 1))
        for v, e in zip(made["videos"], data):
            assert v == {
                "id": v["id"],
                "height": 48,
                "width": 72,
                "length": 3,
                "file_names": [f"{e.video}/{n}.jpg" for n in data.videos[e.video].frames],
                "expressions": [e.text],
                "video": e.video,
                "exp_id": e.id,
            }


def test_ytvos_with_faults_is_not_written(tree, capsys):
    root = tree("ref-youtube-vos")
    shutil.rmtree(root / "test/JPEGImages/test-easy-00001")
    code, said = command(root, capsys, "prepare", "ref-youtube-vos")
    assert (
        code == 1
        and "left out: test-easy-00001" in said.out
        and (root / "valid.json").exists()
        and not (root / "test.json").exists()
    )
    for s in ("valid", "test"):
        shutil.rmtree(root / "meta_expressions" / s)
    code, said = command(root, capsys, "prepare", "ref-youtube-vos")
    assert code == 1 and said.err.count("\n") == 1


def test_annotations_that_are_missing_are_named(tree):
    root = tree("ref-youtube-vos")
    assert check_dataset(root).counts["train"]["masks"] == 6
    shutil.rmtree(root / "train/Annotations/easy-00000")
    survey = check_dataset(root)
    assert (
        survey.counts["train"]["masks"] == 3
        and [(s, u) for s, u, _ in survey.faults] == [("train", "easy-00000")]
        and "3 of 3 masks missing: 00000, 00005, 00010" in survey.faults[0][2]
    )
    path = root / "meta_expressions/train/meta_expressions.json"
    listing = json.loads(path.read_text())
    for e in listing["videos"]["easy-00000"]["expressions"].values():
        del e["obj_id"]
    path.write_text(json.dumps(listing))
    assert check_dataset(root).faults == []  # the answer is hidden


def test_unknown_names(tmp_path):
    for name in (
        "imagenet",
        "",
        "refcoco",
        "ref-davis17",
        "a2d-sentences",
        "jhmdb-sentences",
        "ref-youtube-vos",
        "mevis",
    ):
        with pytest.raises(Problem):
            prepare(name, tmp_path)
