"Propagation: resume, bad input one unit at a time, both directions, real AOT behind the stage."

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rvos_nb.candidates import save_candidates
from rvos_nb.core import Problem
from rvos_nb.data import refshapes, scenes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.masks import read_labels, read_mask, write_labels, write_mask
from rvos_nb.data.video import open_clip, read_video, write_video
from rvos_nb.evaluate import evaluate_vos
from rvos_nb.events import EVENTS_NAME
from rvos_nb.files import read_json, write_json
from rvos_nb.keyframe import as_json
from rvos_nb.models import zoo
from rvos_nb.propagate import propagate
from rvos_nb.propagation import propagate_clip, propagate_vos, walk
from rvos_nb.vos.aot import AOT, AOT_VARIANTS
from rvos_nb.vos.memory import AOTPropagator
from rvos_nb.vos.propagator import AugmentedPropagator, Propagator, Track, walk_tracks


class Shift(Propagator):
    "A step moves the mask one pixel to the right."

    def start(self, size):
        pass

    def remember(self, frame, labels):
        self.mask = torch.as_tensor(labels) > 0

    def step(self, frame):
        self.mask = torch.nn.functional.pad(self.mask, (1, 0))[:, :-1]
        return torch.stack([~self.mask, self.mask]).float()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of two videos, five frames each,
    and a run of true masks with the key frame in the middle."""
    root = tmp_path_factory.mktemp("propagate")
    refshapes.write(root / "data", "valid", "easy", videos=2, seed=3, frames=5, size=(64, 96))
    data, keys = open_dataset(root / "data", "valid"), {}
    for v, video in data.videos.items():
        for e in data.expressions[v]:
            for name, mask in zip(video.frames, data.masks(e)):
                write_mask(root / "run" / "Annotations" / v / e.id / f"{name}.png", mask)
            keys.setdefault(v, {})[e.id] = 2
    write_json(root / "run" / "key_frame.json", as_json(keys))
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "r")
    return tmp_path / "r"


def units(root):
    data = open_dataset(root / "data", "valid")
    return [(v, e.id, data.videos[v].frames) for v in data.videos for e in data.expressions[v]]


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_masks_and_key_frames(root):
    report = propagate(root / "data", root / "run", root / "out", Shift())
    assert not report.failed and len(report.done) == len(units(root))
    for v, e, frames in units(root):
        key = read_mask(root / "run" / "Annotations" / v / e / f"{frames[2]}.png")
        if not key.any():
            continue
        for t, name in enumerate(frames):
            expected = np.pad(key, ((0, 0), (abs(t - 2), 0)))[:, :96]
            path = root / "out" / "Annotations" / v / e / f"{name}.png"
            assert (read_mask(path) == expected).all() and Image.open(path).mode == "L"
    assert not [p for p in (root / "out").rglob("*") if p.name.startswith(".")]


def test_one_direction_keeps_the_other_side(root):
    propagate(root / "data", root / "run", root / "out", Shift(), direction="forward")
    for v, e, frames in units(root):
        for t in (0, 1, 2):
            assert (root / "out" / "Annotations" / v / e / f"{frames[t]}.png").read_bytes() == (
                root / "run" / "Annotations" / v / e / f"{frames[t]}.png"
            ).read_bytes()


def test_resume_gives_the_same_bytes(root):
    whole = propagate(root / "data", root / "run", root / "whole", Shift())
    propagate(root / "data", root / "run", root / "cut", Shift())
    (v, e, frames), (v2, e2, _) = units(root)[0], units(root)[1]
    shutil.rmtree(root / "cut" / "Annotations" / v / e)
    (root / "cut" / "Annotations" / v2 / e2 / f"{frames[0]}.png").unlink()
    half = root / "cut" / "Annotations" / v / ".tmp-0123-left"
    half.mkdir()
    (half / "00000.png").write_bytes(b"half")
    report = propagate(root / "data", root / "run", root / "cut", Shift())
    assert (
        sorted(report.done) == sorted([f"{v}/{e}", f"{v2}/{e2}"])
        and len(report.skipped) == len(whole.done) - 2
    )
    assert tree(root / "cut") == tree(root / "whole")


def list_hidden(folder):
    "What was left half-written; the log of a run stays as long as units of it are to do."
    return [p for p in folder.rglob(".*") if p.name != EVENTS_NAME]


def spoil_frame(root, v, e, frames):
    next((root / "data" / "valid" / "JPEGImages" / v).glob(f"{frames[4]}.*")).unlink()


def spoil_jpeg(root, v, e, frames):
    p = next((root / "data" / "valid" / "JPEGImages" / v).glob(f"{frames[0]}.*"))
    p.write_bytes(p.read_bytes()[:300])


def spoil_size(root, v, e, frames):
    write_mask(root / "run" / "Annotations" / v / e / f"{frames[2]}.png", np.ones((64, 95), bool))


def spoil_png(root, v, e, frames):
    (root / "run" / "Annotations" / v / e / f"{frames[2]}.png").write_bytes(b"\x89PNG\r\n")


def spoil_tree(root, v, e, frames):
    shutil.rmtree(root / "run" / "Annotations" / v / e)


def spoil_key(root, v, e, frames):
    p = root / "run" / "key_frame.json"
    keys = json.loads(p.read_text())
    del keys[v][e]
    write_json(p, keys)


def spoil_index(root, v, e, frames):
    p = root / "run" / "key_frame.json"
    keys = json.loads(p.read_text())
    keys[v][e]["index_info"]["class_index"] = 5
    write_json(p, keys)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_frame, "no such file"),
        (spoil_jpeg, "cannot be read"),
        (spoil_size, "64x95"),
        (spoil_png, "cannot be read"),
        (spoil_tree, "no such folder"),
        (spoil_key, "no entry"),
        (spoil_index, "key frame 5"),
    ],
)
def test_bad_input_costs_its_own_units(root, spoil, words):
    v, e, frames = units(root)[0]
    spoil(root, v, e, frames)
    report = propagate(root / "data", root / "run", root / "out", Shift())
    mine = {u for u in report.failed if u.startswith(f"{v}/")}
    assert (
        f"{v}/{e}" in report.failed
        and words in report.failed[f"{v}/{e}"]
        and set(report.failed) == mine
    )
    assert spoil in (spoil_frame, spoil_jpeg) or len(mine) == 1
    assert (
        len(report.done) == len(units(root)) - len(mine)
        and not (root / "out" / "Annotations" / v / e).exists()
    )
    assert not list_hidden(root / "out")


def test_empty_key_mask_copies_everything(root):
    v, e, frames = units(root)[0]
    write_mask(root / "run" / "Annotations" / v / e / f"{frames[2]}.png", np.zeros((64, 96), bool))
    propagate(root / "data", root / "run", root / "out", Shift())
    assert tree(root / "out" / "Annotations" / v / e) == tree(root / "run" / "Annotations" / v / e)


def test_unusable_inputs(root):
    with pytest.raises(Problem, match="version"):
        propagate(root / "data", root / "run", root / "out", Shift(), version="new")
    with pytest.raises(Problem, match="direction"):
        propagate(root / "data", root / "run", root / "out", Shift(), direction="sideways")
    with pytest.raises(Problem, match="model"):
        propagate(root / "data", root / "run", root / "out", torch.nn.Linear(2, 2))
    with pytest.raises(Problem, match="no such checkpoint"):
        propagate(root / "data", root / "run", root / "out", "no-such-model")
    (root / "run" / "key_frame.json").write_text("[1]")
    with pytest.raises(Problem, match="another form"):
        propagate(root / "data", root / "run", root / "out", Shift())
    (root / "run" / "key_frame.json").unlink()
    with pytest.raises(Problem, match=r"key_frame\.json"):
        propagate(root / "data", root / "run", root / "out", Shift())
    propagate_from = root / "empty"
    propagate_from.mkdir()
    write_json(propagate_from / "key_frame.json", {})
    with pytest.raises(Problem, match="Annotations"):
        propagate(root / "data", propagate_from, root / "out", Shift())


@pytest.fixture(scope="module")
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AOT(AOT_VARIANTS["aot-tiny"]).eval()


@pytest.mark.parametrize("version", ["clean", "challenge"])
def test_a_checkpoint_folder(root, tiny, version):
    zoo.save(tiny, root / "aot", {})
    report = propagate(
        root / "data", root / "run", root / "out", str(root / "aot"), version=version
    )
    assert not report.failed and json.loads((root / "out" / "run.json").read_text())["params"][
        "restart"
    ] is (version == "clean")
    for v, e, frames in units(root):
        assert sorted(p.stem for p in (root / "out" / "Annotations" / v / e).iterdir()) == sorted(
            frames
        )


def test_restart_decides_what_the_way_back_remembers(tiny):
    film = list(scenes.scene(1, "easy", frames=7, size=(64, 96)).frames)
    labels = np.zeros((64, 96), np.uint8)
    labels[20:40, 30:60] = 1
    back = {
        r: dict(walk(AOTPropagator(tiny, gap=2), film[3:], film[3::-1], 3, labels, restart=r))
        for r in (True, False)
    }
    alone = dict(walk(AOTPropagator(tiny, gap=2), film[3:4], film[3::-1], 3, labels))
    assert all((back[True][t] == alone[t]).all() for t in (2, 1, 0)) and set(back[False]) == {
        0,
        1,
        2,
        4,
        5,
        6,
    }


def test_misuse_of_the_protocol(tiny):
    p = AOTPropagator(tiny)
    frame = np.zeros((64, 96, 3), np.uint8)
    p.start((64, 96))
    with pytest.raises(Problem, match="nothing remembered"):
        p.step(frame)
    with pytest.raises(Problem, match="labels"):
        p.remember(frame, np.zeros((64, 95), np.uint8))
    with pytest.raises(Problem, match="frame"):
        p.remember(frame[:60], np.zeros((64, 96), np.uint8))


@pytest.mark.parametrize("size", [(33, 49), (90, 181), (17, 300)])
def test_any_frame_size(tiny, size):
    rng = np.random.default_rng(0)
    p = AOTPropagator(tiny)
    p.start(size)
    labels = np.zeros(size, np.uint8)
    labels[2:9, 4:20] = 7
    p.remember(rng.integers(0, 255, (*size, 3), np.uint8), labels)
    found = p.step(rng.integers(0, 255, (*size, 3), np.uint8))
    assert found.shape == (8, *size) and torch.allclose(found.sum(0), torch.ones(()), atol=1e-4)


def test_mask_token_is_optional_and_the_rest_is_strict(tiny):
    tiny.load_state_dict(tiny.state_dict() | {"LSTT.mask_token": torch.zeros(1, 1, 64)})
    with pytest.raises(RuntimeError, match=r"missing|Missing"):
        tiny.load_state_dict({k: v for k, v in tiny.state_dict().items() if "id_bank" not in k})


class Eye(AOT):
    "Counts the frames that are encoded."

    seen = 0

    def encode(self, x):
        Eye.seen += len(x)
        return super().encode(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": "challenge", "gap": 2},
        {"scales": (0.8, 1.2), "flip": True},
        {"soft": True, "max_memory_frames": 2, "gap": 1},
    ],
    ids=str,
)
def test_together_is_one_by_one(root, options):
    """Sentences with key frames all over the video:
    the same PNGs in company as alone, and each frame is encoded once a direction."""
    data, keys = open_dataset(root / "data", "valid"), {}
    for v in data.videos:
        keys[v] = {e.id: i % 5 for i, e in enumerate(data.expressions[v])}
    write_json(root / "run" / "key_frame.json", as_json(keys))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Eye(AOT_VARIANTS["aot-tiny"])
    seen = {}
    for most in (1, 3, 99):
        Eye.seen = 0
        assert not propagate(
            root / "data",
            root / "run",
            root / f"out-{most}",
            model,
            sentences_at_once=most,
            **options,
        ).failed
        seen[most] = Eye.seen
    assert tree(root / "out-1") == tree(root / "out-3") == tree(root / "out-99")
    views = 4 if "flip" in options else 1
    assert seen[99] <= len(data.videos) * 10 * views < seen[1]


def test_a_company_fails_one_by_one(root, tiny):
    """The last frame is broken. Forward only,
    the sentences that start there need no other frame, and are done all the same."""
    (v, e, frames), *others = [u for u in units(root) if u[0] == units(root)[0][0]]
    p = root / "run" / "key_frame.json"
    keys = json.loads(p.read_text())
    keys[v][e]["index_info"]["class_index"] = 0
    write_json(p, keys)
    spoil_frame(root, v, e, frames)
    report = propagate(root / "data", root / "run", root / "out", tiny, direction="backward")
    assert not report.failed
    report = propagate(root / "data", root / "run", root / "ahead", tiny, direction="forward")
    assert {f"{v}/{e}"} | {f"{v}/{o[1]}" for o in others} == set(report.failed) and all(
        frames[4] in why for why in report.failed.values()
    )
    assert not (root / "ahead" / "Annotations" / v / e).exists()
    assert not list_hidden(root / "ahead")


def test_next_best(root):
    v, e, frames = units(root)[0]

    def drawn(t, mask):
        write_mask(root / "run" / "Annotations" / v / e / f"{frames[t]}.png", mask)

    for t in range(5):
        drawn(t, np.zeros((64, 96), bool) if t != 3 else np.eye(64, 96) > 0)
    report = propagate(root / "data", root / "run", root / "none", Shift(), empty="next_best")
    assert f"{v}/{e}" in report.failed and "safetensors" in report.failed[f"{v}/{e}"]  # no scores
    scores = np.float32([0.1, 0.3, 0.9, 0.2, 0.8])
    save_candidates(
        root / "run" / "candidates" / v / f"{e}.safetensors",
        np.zeros((5, 2, 2), np.float32),
        scores,
        np.zeros((5, 4), np.float32),
        {"kind": "logit", "size": (64, 96), "frames": list(frames), "model": "toy", "text": "it"},
    )
    report = propagate(root / "data", root / "run", root / "out", Shift(), empty="next_best")
    assert not report.failed
    found = [read_mask(root / "out" / "Annotations" / v / e / f"{f}.png") for f in frames]
    assert (found[3] == (np.eye(64, 96) > 0)).all() and [int(m.any(0).argmax()) for m in found] == [
        3,
        2,
        1,
        0,
        1,
    ]
    drawn(3, np.zeros((64, 96), bool))
    propagate(root / "data", root / "run", root / "all-empty", Shift(), empty="next_best")
    assert tree(root / "all-empty" / "Annotations" / v / e) == tree(
        root / "run" / "Annotations" / v / e
    )
    with pytest.raises(Problem, match="other parameters"):
        propagate(root / "data", root / "run", root / "out", Shift())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"feedback": "all"}, "feedback"),
        ({"scales": ()}, "scales"),
        ({"gap": 0}, "gap"),
        ({"max_memory_frames": -1}, "max_memory"),
        ({"empty": "skip"}, "empty"),
        ({"together": 0}, "together"),
    ],
)
def test_choices_that_are_not(root, options, words):
    with pytest.raises(Problem, match=words):
        propagate(root / "data", root / "run", root / "out", Shift(), **options)
    assert not (root / "out").exists()


def test_views_need_forks(root):
    with pytest.raises(Problem, match="several times"):
        propagate(root / "data", root / "run", root / "out", Shift(), flip=True)
    with pytest.raises(Problem, match="gap"):
        propagate(root / "data", root / "run", root / "out", Shift(), gap=2)


def test_bounded_memory(tiny):
    """With a limit of three frames the memory holds three however long the clip,
    the reference among them."""
    film = list(scenes.scene(1, "easy", frames=14, size=(48, 64)).frames)
    labels = np.zeros((48, 64), np.uint8)
    labels[10:30, 10:40] = 1
    p = AOTPropagator(tiny, gap=1, max_memory_frames=3)
    assert len(dict(walk(p, film, [], 0, labels))) == 13
    assert (
        len(p.engine.memories[0].long) == 3
        and sum(f.reference for f in p.engine.memories[0].long) == 1
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "Seven frames of an odd size as JPEGs, and a palette mask of two objects with odd ids."
    root = tmp_path_factory.mktemp("clip")
    scene = scenes.scene(2, "easy", frames=7, size=(61, 83))
    (root / "clip").mkdir()
    for t, frame in enumerate(scene.frames):
        Image.fromarray(frame).save(root / "clip" / f"img{t}.jpeg")
    labels = np.zeros((61, 83), np.uint8)
    labels[10:30, 5:30], labels[35:50, 40:70] = 40, 7
    write_labels(root / "mask.png", labels)
    return root


def test_a_clip_with_any_ids(clip, tmp_path, tiny):
    video = propagate_clip(
        open_clip(clip / "clip"),
        {2: clip / "mask.png"},
        tmp_path,
        tiny,
        max_memory_frames=2,
        gap=1,
    )
    found = [
        read_labels(tmp_path / "Annotations" / "clip" / f"img{t}.png", (61, 83)) for t in range(7)
    ]
    assert (
        all(set(np.unique(m)) <= {0, 7, 40} for m in found)
        and (found[2] == read_labels(clip / "mask.png")).all()
    )
    assert (
        Image.open(tmp_path / "Annotations" / "clip" / "img0.png").mode == "P"
        and len(list(read_video(open_clip(video)))) == 7
    )


def test_more_objects_than_one_engine_holds(clip, tmp_path, tiny):
    labels = np.zeros((61, 83), np.uint8)
    for i in range(12):
        labels[5 * i : 5 * i + 4, 10:70] = 20 * i + 3
    propagate_clip(open_clip(clip / "clip"), {0: labels}, tmp_path, tiny)
    assert set(np.unique(labels)) > set(
        np.unique(read_labels(tmp_path / "Annotations" / "clip" / "img6.png"))
    ) - {0}


@pytest.mark.parametrize(
    "version, options",
    [
        ("clean", {}),
        ("challenge", {"gap": 2}),
        ("clean", {"scales": (1.0, 1.2), "flip": True, "feedback": "merged"}),
    ],
)
def test_a_long_film_is_read_in_pieces(clip, tmp_path, tiny, version, options):
    """A video file, walked backwards from its last frame,
    and the folder of its decoded frames: the same PNGs."""
    write_video(
        tmp_path / "film.mp4",
        (f for _ in range(6) for f in read_video(open_clip(clip / "clip"))),
        10,
    )
    film = open_clip(tmp_path / "film.mp4", "clip")
    (tmp_path / "frames").mkdir()
    for name, frame in zip(film.frames, read_video(film)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{name}.png")
    labels = np.pad(read_labels(clip / "mask.png"), ((0, 1), (0, 1)))  # films have even sizes
    for source, out in ((film, "a"), (open_clip(tmp_path / "frames", "clip"), "b")):
        propagate_clip(source, {41: labels}, tmp_path / out, tiny, version=version, **options)
    a, b = tree(tmp_path / "a" / "Annotations"), tree(tmp_path / "b" / "Annotations")
    assert len(a) == 42 and a == b


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: write_labels(root / "mask.png", np.ones((61, 82), np.uint8)), "61x82"),
        (lambda root: write_mask(root / "mask.png", np.zeros((61, 83), bool)), "no object"),
        (lambda root: (root / "mask.png").unlink(), "no such file"),
        (lambda root: (root / "mask.png").write_bytes(b"x"), "cannot be read"),
        (
            lambda root: Image.fromarray(
                np.random.default_rng(0).integers(0, 255, (61, 83, 3), np.uint8)
            ).save(root / "mask.png"),
            "colours",
        ),
        (
            lambda root: (root / "clip" / "img5.jpeg").write_bytes(
                (root / "clip" / "img5.jpeg").read_bytes()[:200]
            ),
            "img5",
        ),
        (lambda root: Image.new("RGB", (83, 60)).save(root / "clip" / "img1.jpeg"), "img1"),
    ],
)
def test_a_clip_with_a_fault_writes_nothing(clip, tmp_path, spoil, words):
    shutil.copytree(clip, tmp_path / "c")
    spoil(tmp_path / "c")
    with pytest.raises(Problem, match=words):
        propagate_clip(
            open_clip(tmp_path / "c" / "clip"),
            {2: tmp_path / "c" / "mask.png"},
            tmp_path / "out",
            Shift(),
        )
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_references_in_mid_clip(tiny):
    """A second object at frame 3 is a new reference:
    what follows is what the engine gives when told so by hand."""
    film = list(scenes.scene(4, "easy", frames=6, size=(64, 96)).frames)
    first, second = np.zeros((64, 96), np.uint8), np.zeros((64, 96), np.uint8)
    first[5:30, 5:40] = 1
    second[30:60, 50:90] = 2
    found = {
        t: m
        for _, t, m in walk_tracks(
            [Track(AOTPropagator(tiny, gap=2), {0: first, 3: second})], enumerate(film)
        )
    }
    p = AOTPropagator(tiny, gap=2)
    p.start((64, 96))
    p.remember(film[0], first)
    for t in range(1, 6):
        by_hand = p.step(film[t]).argmax(0).numpy().astype(np.uint8)
        if t == 3:
            by_hand = np.where(second > 0, second, by_hand)
            p.remember(film[t], by_hand)
        assert (found[t] == by_hand).all()
    assert found[4].max() <= 2 and len(p.engine.memories[0].long) == 3  # frames 0, 2 and 3


def test_views_in_their_published_order(tiny):
    views = AugmentedPropagator(AOTPropagator(tiny), (0.8, 1.0, 1.2), True)
    assert [(v.scale, f) for v, f in views.views] == [
        (s, f) for s in (0.8, 1.0, 1.2) for f in (False, True)
    ]
    with pytest.raises(Problem, match="feedback"):
        AugmentedPropagator(AOTPropagator(tiny), feedback="none")


def test_a_benchmark_of_masks(tmp_path, tiny):
    """YouTube-VOS with the truth of all frames on disk:
    an object is shown in its first frame only, and what is done and undone again is the same."""
    scene = scenes.scene(5, "easy", frames=6, size=(48, 64))
    labels = scene.labels.copy()
    late = int(labels[3].max())
    labels[:3][labels[:3] == late] = 0
    folder, ids = tmp_path / "data" / "valid", [int(i) for i in np.unique(labels) if i]
    for v in ("a", "b"):
        (folder / "JPEGImages" / v).mkdir(parents=True)
        for t in range(6):
            Image.fromarray(scene.frames[t]).save(folder / "JPEGImages" / v / f"{5 * t:05d}.jpg")
            write_labels(folder / "Annotations" / v / f"{5 * t:05d}.png", labels[t])
    meta = {
        "objects": {
            str(i): {
                "category": "shape",
                "frames": [f"{5 * t:05d}" for t in range(6) if (labels[t] == i).any()],
            }
            for i in ids
        }
    }
    write_json(folder / "meta.json", {"videos": {"a": meta, "b": meta}})
    assert not propagate_vos(tmp_path / "data", tmp_path / "out", tiny).failed
    first = {i: min(t for t in range(6) if (labels[t] == i).any()) for i in ids}
    order = np.uint8([0, *sorted(ids, key=lambda i: (first[i], i))])
    table = np.zeros(256, np.uint8)
    table[order] = np.arange(len(order))
    given = {
        t: table[np.where(np.isin(labels[t], [i for i in ids if first[i] == t]), labels[t], 0)]
        for t in {*first.values()}
    }
    assert first[late] == 3 and 0 in given
    for _, t, m in walk_tracks(
        [Track(AOTPropagator(tiny), given)],
        enumerate(read_video(open_clip(folder / "JPEGImages" / "a"))),
    ):
        assert (
            order[m] == read_labels(tmp_path / "out" / "Annotations" / "a" / f"{5 * t:05d}.png")
        ).all()
    before = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "Annotations" / "a")
    (tmp_path / "out" / "Annotations" / "b" / "00010.png").unlink()
    assert (
        propagate_vos(tmp_path / "data", tmp_path / "out", tiny).done == ["a", "b"]
        and tree(tmp_path / "out") == before
    )
    assert evaluate_vos(tmp_path / "data", tmp_path / "out")["objects"] == 2 * len(ids)
    assert read_json(tmp_path / "out" / "run.json")["params"]["direction"] == "forward"
    write_labels(folder / "Annotations" / "a" / "00000.png", labels[0][:40])
    shutil.rmtree(tmp_path / "out" / "Annotations")
    report = propagate_vos(tmp_path / "data", tmp_path / "out", tiny)
    assert (
        report.done == ["b"]
        and "40x64" in report.failed["a"]
        and not (tmp_path / "out" / "Annotations" / "a").exists()
    )
