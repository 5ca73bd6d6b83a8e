"""A clip and some words, as people bring them: one call in Python, one in a terminal; what comes
of it, what is said beforehand, how it goes on, and whatever may be wrong with what is brought."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from rvos_nb import clip_result, segmentation
from rvos_nb.app import AppWork, Visit
from rvos_nb.cli import main
from rvos_nb.clip_result import open_result
from rvos_nb.core import Problem, usual_shape
from rvos_nb.data import scenes
from rvos_nb.data.masks import choose_colours, overlay, rle_decode
from rvos_nb.data.video import frame_rate, frame_times, open_clip, read_video
from rvos_nb.models.catalogue import find
from rvos_nb.segmentation import segment

ROOT = Path(__file__).resolve().parents[1]
SIZE = (64, 96)
SENTENCES = ["the red circle", "the blue square"]


def write_film(path, frames, rate=10, sound="", ticks=None, pixels="yuv420p", codec="libx264"):
    "A film of some frames, with a hum where `sound` is a codec; `ticks` are milliseconds."
    with av.open(str(path), "w") as box:
        pictures = box.add_stream(codec, rate=rate)
        pictures.pix_fmt, (pictures.height, pictures.width) = pixels, frames[0].shape[:2]
        hum = box.add_stream(sound, rate=16_000) if sound else None
        for t, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[t], Fraction(1, 1000)
            box.mux(pictures.encode(frame))
            if hum:
                wave = np.sin(np.arange(1600) / 10) * 9000
                heard = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
                heard.sample_rate, heard.pts = 16_000, 1600 * t
                box.mux(hum.encode(heard))
        for stream in filter(None, (pictures, hum)):
            box.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Twelve frames of a scene, with sound."
    frames = scenes.scene(11, "easy", frames=12, size=SIZE).frames
    path = tmp_path_factory.mktemp("film") / "shapes.mp4"
    return write_film(path, frames, sound="aac")


@pytest.fixture(scope="module")
def result(film, tmp_path_factory):
    return segment(film, SENTENCES, out=tmp_path_factory.mktemp("out") / "shapes", clip_length=5)


def rvos(*argv):
    "A command that succeeds."
    with pytest.raises(SystemExit) as e:
        main([str(word) for word in argv])
    assert not e.value.code


def tell(call, *args, **options):
    "What is assumed on the way, and the result."
    with warnings.catch_warnings(record=True, action="always") as told:
        made = call(*args, **options)
    return [str(w.message) for w in told], made


# Python


def test_importing_costs_nothing():
    code = "import rvos_nb, sys; print({'torch', 'numpy', 'typer', 'cv2'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
    [line] = [line for line in done.stderr.splitlines() if line.endswith("| rvos_nb")]
    assert int(line.split("|")[1]) < 200_000  # microseconds


def test_the_package_gives_the_one_call():
    import rvos_nb

    assert rvos_nb.segment is segment and "segment" in dir(rvos_nb)
    with pytest.raises(AttributeError, match="no attribute 'segmnt'"):
        rvos_nb.segmnt  # noqa: B018


def test_a_result_is_what_it_says(result, film):
    assert len(result) == 12 and result.sentences == SENTENCES
    for s in SENTENCES:
        masks = np.asarray(result.masks[s])
        assert masks.shape == result.masks[s].shape == (12, *SIZE) and masks.dtype == bool
        assert (result.present[s] == masks.any((1, 2))).all()
        assert result.boxes[s].shape == (12, 4) and result.scores[s].shape == (12,)
        k = result.key_frames[s]
        if result.present[s].any():
            assert result.scores[s][k] == result.scores[s][result.present[s]].max()
    text = repr(result)
    for word in ("shapes.mp4", "12 frames", "96x64", *SENTENCES, "masks[", "show()", "save("):
        assert word in text
    assert open_clip(film).frames == result.clip.frames


def test_the_masks_are_those_of_the_prediction_stage(result, film):
    from rvos_nb.predict import ask_video, load_referring

    answer = ask_video(
        load_referring("referformer-tiny"), open_clip(film), SENTENCES, clip_length=5
    )
    for e, s in enumerate(SENTENCES):
        masks = segmentation.draw_masks(answer["logits"][e], SIZE, answer["kind"])
        assert (np.asarray(result.masks[s]) == masks).all()
        assert np.allclose(result.scores[s], answer["scores"][e], atol=1e-5)


def test_a_temporary_result_lives_as_long_as_it_is_held(film):
    made = segment(film, SENTENCES[0], short_side=48)
    folder, part = made.folder, made[2:4]
    del made
    assert folder.is_dir() and part.masks[SENTENCES[0]][0].shape == SIZE
    del part
    assert not folder.exists()


def test_masks_are_read_lazily(result, monkeypatch):
    read = []
    monkeypatch.setattr(clip_result, "read_mask", lambda path, size: read.append(path))
    masks = result.masks[SENTENCES[0]]
    few = masks[2:10][::2]
    assert not read and few.shape == (4, *SIZE)
    few[1]
    assert [path.name for path in read] == ["00004.png"]


def test_coco_gives_the_masks_back(result):
    coco = result.to_coco()
    assert [c["name"] for c in coco["categories"]] == SENTENCES and len(coco["images"]) == 12
    for row in coco["annotations"]:
        s, t = SENTENCES[row["category_id"] - 1], row["image_id"] - 1
        assert (rle_decode(row["segmentation"]) == result.masks[s][t]).all()
    count = sum(int(result.present[s].sum()) for s in SENTENCES)
    assert len(coco["annotations"]) == count
    assert json.loads((result.folder / "masks.json").read_text())["images"] == coco["images"]


def test_supervision(result):
    try:
        import supervision
    except ImportError:
        with pytest.raises(Problem, match="pip install supervision"):
            next(result.to_supervision())
        return
    for t, found in enumerate(result.to_supervision()):
        assert isinstance(found, supervision.Detections)
        assert len(found) == sum(result.present[s][t] for s in SENTENCES)
        for words, mask in zip(found["class_name"], found.mask):
            assert (mask == result.masks[words][t]).all()


def write_frames(result, folder):
    "The frames of a clip, under the names that `masks.json` has for them."
    folder.mkdir(parents=True)
    names = [image["file_name"] for image in result.to_coco()["images"]]
    for name, frame in zip(names, read_video(result.clip)):
        Image.fromarray(frame).save(folder / name)
    return folder


def read_in_supervision(result, folder):  # (sentence, frame, mask) of each annotation
    api = pytest.importorskip("supervision", reason="no supervision: pip install supervision")
    place, coco = str(write_frames(result, folder)), str(result.folder / "masks.json")
    data = api.DetectionDataset.from_coco(place, coco, force_masks=True)
    for path, _, found in data:
        for category, mask in zip(found.class_id, found.mask):
            yield data.classes[category], int(Path(path).stem), mask


def read_in_datumaro(result, folder):
    "As CVAT reads COCO."
    api = pytest.importorskip("datumaro", reason="no datumaro: pip install datumaro")
    write_frames(result, folder / "images/default")
    (folder / "annotations").mkdir()
    shutil.copy(result.folder / "masks.json", folder / "annotations/instances_default.json")
    data = api.Dataset.import_from(str(folder), "coco")
    labels = [label.name for label in data.categories()[api.AnnotationType.label]]
    for item in data:
        for found in item.annotations:
            if isinstance(found, api.Mask):  # its box comes as another annotation
                yield labels[found.label], int(item.id), found.image


def read_in_fiftyone(result, folder):
    "Its importer, which needs no MongoDB."
    api = pytest.importorskip("fiftyone.utils.coco", reason="no FiftyOne: pip install fiftyone")
    place, coco = str(write_frames(result, folder)), str(result.folder / "masks.json")
    kind = api.COCODetectionDatasetImporter
    with kind(data_path=place, labels_path=coco, label_types="segmentations") as reader:
        for path, _, found in reader:
            for one in found.detections:
                mask = np.zeros(result.size, bool)
                x, y = (round(v * n) for v, n in zip(one.bounding_box, result.size[::-1]))
                h, w = one.mask.shape
                mask[y : y + h, x : x + w] = one.mask
                yield one.label, int(Path(path).stem), mask


READERS = [read_in_supervision, read_in_datumaro, read_in_fiftyone]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_other_programs_read_the_same_masks(read, result, tmp_path):
    found = [*read(result, tmp_path / "frames")]
    for words, t, mask in found:
        assert (np.asarray(mask, bool) == result.masks[words][t]).all()
    assert len(found) == sum(int(result.present[s].sum()) for s in SENTENCES)


# The overlay


def test_the_overlay_plays_in_a_browser_and_keeps_its_sound(result, film):
    path = result.folder / "overlay.mp4"
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "it streams"
    with av.open(str(path)) as box:
        pictures, sound = box.streams.video[0], box.streams.audio[0]
        assert pictures.codec_context.name == "h264" and pictures.pix_fmt == "yuv420p"
        assert sound.codec_context.name == "aac"
        heard = [np.abs(frame.to_ndarray()).max() for frame in box.decode(audio=0)]
        assert np.mean(np.array(heard) > 0.01) > 0.8
    clip = open_clip(path)
    assert len(clip.frames) == 12 and frame_rate(clip) == frame_rate(open_clip(film)) == 10


def test_each_sentence_has_its_colour_and_its_words(result):
    first = next(result.pictures())
    bare = overlay(next(read_video(result.clip)), [m[0] for m in result.masks.values()])
    corner = (first != bare).any(-1)
    assert corner.any() and not corner[SIZE[0] // 2 + 2 :].any()
    for color in choose_colours(2).astype(np.uint8):
        assert (first[corner] == color).all(-1).any()


def test_no_mask_hides_another():
    grey, same = np.full((60, 90, 3), 120, np.uint8), np.zeros((3, 60, 90), bool)
    same[:, 10:50, 20:70] = True
    painted = overlay(grey, same)
    seen = {tuple(color) for color in painted[same[0]]}
    assert {tuple(color) for color in choose_colours(3).astype(np.uint8)} <= seen
    same[1:] = False
    assert (overlay(grey, same) == overlay(grey, same[:1])).all()


def test_another_rate_goes_without_sound(film, tmp_path):
    segment(film, SENTENCES[0], out=tmp_path, fps=5, short_side=48)
    with av.open(str(tmp_path / "overlay.mp4")) as box:
        assert not box.streams.audio and box.streams.video[0].average_rate == 5


def test_the_page_holds_everything(result):
    page = (result.folder / "page.html").read_text(encoding="utf-8")
    assert (
        page.count("<script>") == 1
        and "http" not in page
        and "src=" not in page.split("<script")[0]
    )
    assert all(f"“{s}”" in page for s in SENTENCES) and 'type="range"' in page
    assert len(json.loads(page.split('"pictures": ')[1].split("], ")[0] + "]")) == 12


PAGE = """
const listeners = {};
function element() {return {attributes: {}, dataset: {}, parts: {}, lists: {}, value: '0',
  setAttribute(name, value) {this.attributes[name] = value},
  querySelector(q) {return this.parts[q] || (this.parts[q] = element())},
  querySelectorAll(q) {return this.lists[q] || []},
  getBoundingClientRect() {return {left: 0, width: 1000}}}}
const root = element(), key = element(), lines = [element(), element()];
root.ownerDocument = {addEventListener(name, call) {listeners[name] = call}};
root.lists = {li: lines, a: [key]};
key.dataset.frame = '3';
globalThis.document = {currentScript: {previousElementSibling: root}};
SCRIPT
const quiet = {preventDefault() {}, target: null}, said = () => root.parts.output.textContent;
const seen = [];
root.parts.input.value = '2'; root.parts.input.oninput(); seen.push(said());
listeners.keydown({...quiet, key: 'ArrowRight'}); seen.push(said());
root.parts.svg.onpointerdown({clientX: 1000}); seen.push(said());
key.onclick(quiet); seen.push(said(), lines[1].parts.b.textContent);
console.log(seen.join(';'));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, to run the page's script")
def test_the_slider_the_keys_and_the_curve_choose_the_frame(result):
    page = (result.folder / "page.html").read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    program = PAGE.replace("SCRIPT", script)
    done = subprocess.run(["node", "-"], input=program, capture_output=True, text=True)
    score = result.scores[SENTENCES[1]][3]
    frames = [f"frame {t} of 12" for t in (2, 3, 11, 3)]
    assert done.stdout.strip().split(";") == [*frames, f"{score:.2f}"], done.stderr


# What is said, and when


def test_what_one_should_know_is_said_before_the_work(film, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RVOS_PROGRESS", "0")
    rvos("predict", film, "the dog,cat", "red", "--out", tmp_path / "o", "--every", 4)
    said = capfd.readouterr().err.splitlines()
    small, carries, words, *rest = said
    assert "referformer-tiny" in small and "coloured shapes" in small and "rvos models" in small
    assert "aot-tiny" in carries and "facebook/sam2.1" in carries
    assert words.startswith("note: ") and "never met: dog, cat;" in words
    assert rest[0].startswith("predict: ") and any(line.startswith("fill in: ") for line in rest)
    assert rest[-1].startswith("overlay: 12 of 12, 0:00 left")


def test_a_tiny_propagator_warns_and_shows_how_long_it_takes(film, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RVOS_PROGRESS", "0")
    mask = np.zeros(SIZE, np.uint8)
    mask[10:30, 10:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["propagate", str(film), "--mask", str(tmp_path / "mask.png")]
    rvos(*argv, "--out", tmp_path / "out")
    note, *rest = capfd.readouterr().err.splitlines()
    assert "aot-tiny" in note and "SAM 2" in note and rest[0].startswith("propagate: 1 of 12")
    with av.open(str(tmp_path / "out/overlay.mp4")) as box:
        assert box.streams.audio, "the sound is kept"


# Going on


ENDED = """
import os, signal, sys
from rvos_nb import cli, segmentation

add = segmentation.Journal.add

def end_after_one(self, scores):
    if len(self.pieces) > 1:
        os.kill(os.getpid(), signal.SIGINT)
    add(self, scores)

segmentation.Journal.add = end_after_one
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(sys.argv[1:])
"""


def test_ctrl_c_leaves_what_is_done_and_a_second_call_goes_on(film, result, tmp_path, monkeypatch):
    argv = ["predict", str(film), *SENTENCES, "--clip-length", "5", "--out", str(tmp_path / "o")]
    ended = subprocess.run([sys.executable, "-c", ENDED, *argv], capture_output=True, text=True)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr, ended.stderr
    assert "the same command goes on" in ended.stderr
    asked, answer = [], segmentation.ask_clips

    def note(model, clips, *args):
        asked.extend(len(frames) for frames in clips)
        return answer(model, clips, *args)

    monkeypatch.setattr(segmentation, "ask_clips", note)
    rvos(*argv)
    assert sum(asked) <= 7, "five of the twelve frames were done"
    again = open_result(tmp_path / "o")
    for s in SENTENCES:
        assert (np.asarray(again.masks[s]) == np.asarray(result.masks[s])).all()
        assert np.allclose(again.scores[s], result.scores[s])
    asked.clear()
    rvos(*argv)
    assert not asked, "all was done"
    rvos(*argv, "--threshold", 0.6)
    assert sum(asked) == 12, "something else is asked for"


def test_a_folder_of_another_stage_is_left_alone(film, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(Problem, match="results of a data set"):
        segment(film, "it", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# Every so many-th frame, propagation, members


def test_every_third_frame_and_the_rest_filled_in(film, result):
    few = segment(film, SENTENCES, every=3, clip_length=2)
    assert len(few) == 12 and few.masks[SENTENCES[0]].shape == (12, *SIZE)
    for s in SENTENCES:
        assert (few.scores[s][::3] == few.scores[s][1::3]).all() and few.key_frames[s] % 3 == 0
        both = np.asarray(few.masks[s]) & np.asarray(result.masks[s])
        assert both.sum() >= 0.3 * np.asarray(result.masks[s]).sum()


def test_the_surest_mask_is_carried_on(film):
    one = segment(film, SENTENCES[0], propagate="aot-tiny")
    k = one.key_frames[SENTENCES[0]]
    plain = segment(film, SENTENCES[0])
    assert (one.masks[SENTENCES[0]][k] == plain.masks[SENTENCES[0]][k]).all()
    assert one.made["options"]["propagate"] == "aot-tiny"


def test_members_are_averaged(film):
    alone = segment(film, SENTENCES[0])
    twice = segment(film, SENTENCES[0], members=["referformer-tiny"])
    s = SENTENCES[0]
    assert (np.asarray(alone.masks[s]) == np.asarray(twice.masks[s])).mean() > 0.999
    assert "referformer-tiny and referformer-tiny" in repr(twice)


# What people bring


def pictures(folder, count=4, mode="RGB", size=(40, 30), suffix="png"):
    folder.mkdir(exist_ok=True)
    for t in range(count):
        Image.new(mode, size, (90 + t,) * len(mode)).save(folder / f"{t}.{suffix}")
    return folder


def bring_nothing(folder):
    (folder / "x.txt").write_text("hello")
    return folder


def bring_text(folder):
    (folder / "film.mp4").write_text("this is no film\n" * 99)
    return folder / "film.mp4"


def bring_silence(folder):
    with av.open(str(folder / "sound.mp4"), "w") as box:
        hum = box.add_stream("aac", rate=16_000)
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
        heard.sample_rate = 16_000
        box.mux(hum.encode(heard))
        box.mux(hum.encode())
    return folder / "sound.mp4"


@pytest.mark.parametrize(
    "bring, said",
    [
        (bring_nothing, "no frames"),
        (bring_text, "cannot be decoded"),
        (bring_silence, "cannot be decoded (it holds sound only)"),
        (lambda folder: folder / "nowhere.mp4", "no such file"),
        (lambda folder: bring_text(folder).with_name("flim.mp4"), "did you mean 'film.mp4'"),
        (lambda folder: bring_text(folder).parent, "such as {}/film.mp4"),
        (lambda folder: pictures(folder / "a", 1).parent, "such as {}/a"),
        (lambda folder: "https://somewhere.org/dog.mp4", "download the film"),
    ],
)
def test_what_is_no_clip_is_one_line(bring, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["predict", str(bring(tmp_path)), "it", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 1 and len(lines) == 1, lines
    assert said.format(tmp_path) in lines[0], lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["the red circle", "{film}"], 'rvos predict {film} "the red circle"'),
        (["{film}", "the", "dog"], 'rvos predict {film} "the dog"'),
        (["my dog"], "rvos predict 'my dog' \"the dog\""),
        (["{film}", "it", "--split", "train"], "--split: found a clip"),
        (["{film}", "it", "--present", "0.5"], "--present: found a clip"),
        (["{film}", "it", "--executor", "ray"], "--executor: found a clip"),
    ],
)
def test_what_is_typed_wrong_comes_with_what_is_right(words, said, film, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["predict", *(w.format(film=film) for w in words), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert e.value.code == 1 and said.format(film=film) in told, told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "frames, said",
    [
        (5, "frames: found int"),
        (None, "frames: found NoneType"),
        (Image.new("RGB", (8, 6)), "frames: found Image"),
        (iter([Image.new("RGB", (8, 6))]), "frames: found list_iterator"),
        (["0.png", "1.png"], "frame 0: found a path"),
        ([Image.new("RGB", (8, 6)), Image.new("RGB", (9, 6))], "frame 1: found 6x9 pixels"),
    ],
)
def test_frames_in_no_form_are_named(frames, said):
    with pytest.raises(Problem, match=said):
        segment(frames, "it")


def test_no_sentence_is_told():
    for nothing in (None, [], [None]):
        with pytest.raises(Problem, match="an empty sentence"):
            segment([Image.new("RGB", (8, 6))], nothing)


def test_one_member_may_be_named_alone(film):
    found = segment(film, "the red circle", members="soc-tiny")
    assert found.made["model"] == "referformer-tiny and soc-tiny"


def test_the_folder_one_stands_in_is_a_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(pictures(tmp_path / "mine", 2))
    assert repr(segment(".", "it")).startswith("mine: 2 frames of ")
    (tmp_path / "mine/below").mkdir()
    monkeypatch.chdir(tmp_path / "mine/below")
    rvos("predict", "..", "it", "--out", tmp_path / "out")
    assert open_result(tmp_path / "out").clip.id == "mine"


def test_a_picture_that_moves_is_told_once(tmp_path):
    first, *more = [Image.new("RGB", (32, 24), (40 * t, 0, 0)) for t in range(4)]
    first.save(tmp_path / "moves.webp", save_all=True, append_images=more)
    told, found = tell(segment, tmp_path / "moves.webp", "it")
    assert len(found) == 1 and "found in" in repr(found) and "1 frame of" in repr(found)
    assert len([line for line in told if "a picture file with 4 pictures" in line]) == 1


SENTENCES_BROUGHT = {
    "": "empty sentence",
    "  \n": "empty sentence",
    "the red dog " * 850: "reads",
}


@pytest.mark.parametrize("text", SENTENCES_BROUGHT, ids=["empty", "blank", "long"])
def test_a_sentence_that_cannot_be_read_is_one_line(text, film, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", str(film), text, "--out", str(tmp_path / "out")])
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("rvos: ") and len(lines[0]) < 3000
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("text", ["собака", "那只狗", "الكلب", "🐕 runs", "it's <b>&amp;</b>"])
def test_other_scripts_and_signs(text, film, tmp_path):
    _, found = tell(segment, film, text, out=tmp_path / "out")
    assert found.masks[text].shape == (12, *SIZE)
    assert open_result(tmp_path / "out").sentences == [text]
    assert "<b>&amp;" not in (tmp_path / "out/page.html").read_text(encoding="utf-8")


def test_a_broken_picture_is_left_out_and_named(tmp_path):
    folder = pictures(tmp_path / "clip", 5)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    told, found = tell(segment, folder, "it")
    assert found.clip.frames == ("0", "1", "3", "4")
    assert any("2.png" in line and "left out" in line for line in told)
    for path in folder.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(Problem, match="no picture that can be read"):
        segment(folder, "it")


def test_a_broken_frame_of_a_film_is_named(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(12)]
    path = write_film(tmp_path / "a.mp4", frames)
    with av.open(str(path)) as box:
        packet = [p for p in box.demux(video=0) if p.size][6]
    data = bytearray(path.read_bytes())
    data[packet.pos + 4 : packet.pos + packet.size] = b"\xff" * (packet.size - 4)
    path.write_bytes(data)
    told, found = tell(segment, path, "it")
    assert 10 <= len(found) <= 12 and any("does not decode" in x or "damaged" in x for x in told)


def test_a_variable_rate_is_kept(tmp_path):
    ticks = [0, 100, 200, 1200, 1300, 2300, 2400, 2500]
    frames = [np.full((48, 64, 3), 20 * t, np.uint8) for t in range(8)]
    path = write_film(tmp_path / "v.mp4", frames, ticks=ticks, sound="aac")
    segment(path, "it", out=tmp_path / "out")
    times = frame_times(open_clip(tmp_path / "out/overlay.mp4"))
    assert [1000 * t for t in times] == ticks


def test_a_turned_film_is_upright(tmp_path):
    phone = ROOT / "tests/trials/phone.mp4"
    found = segment(phone, "it", out=tmp_path / "out")
    size = next(read_video(open_clip(phone))).shape[:2]
    assert found.size == size
    assert next(read_video(open_clip(tmp_path / "out/overlay.mp4"))).shape[:2] == size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("size", [(33, 31), (1, 9), (40, 30)])
def test_odd_sizes_and_alpha(mode, size, tmp_path):
    found = segment(pictures(tmp_path / "clip", 2, mode, size), "it", out=tmp_path / "out")
    assert found.size == size[::-1] and found.masks["it"].shape == (2, *size[::-1])
    even = tuple(n + n % 2 for n in size[::-1])
    assert next(read_video(open_clip(tmp_path / "out/overlay.mp4"))).shape[:2] == even


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the user may write everywhere")
def test_a_place_that_cannot_be_written_read_only(film, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(Problem, match="no permission"):
        segment(film, "it", out=tmp_path / "locked/out")


def test_a_place_that_cannot_be_written(film, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Problem, match="no folder can be made"):
        segment(film, "it", out=tmp_path / "file/out")


@pytest.mark.parametrize(
    "name, near",
    [("referformer-tyni", "referformer-tiny"), ("soc-vide-swin-b", "soc-video-swin-b")],
)
def test_a_name_that_there_is_not_comes_with_the_nearest(name, near, film, tmp_path):
    for call in (lambda: find(name), lambda: segment(film, "it", name, tmp_path / "out")):
        with pytest.raises(Problem, match=f"did you mean '{near}'"):
            call()
    with pytest.raises(Problem, match="referring model"):
        segment(film, "it", "aot-tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tree_of_a_benchmark_is_asked_as_such(tmp_path, capsys):
    from rvos_nb.data import refshapes

    refshapes.write(tmp_path / "data", "valid", "easy", videos=1, seed=4, frames=3, size=SIZE)
    rvos("predict", tmp_path / "data", "--out", tmp_path / "run")
    assert (tmp_path / "run/run.json").exists()
    with pytest.raises(SystemExit):
        main(["predict", "--data", str(tmp_path / "data"), "--every", "3"])
    assert "--every with a data set" in capsys.readouterr().err


def test_a_sentence_about_a_data_set_is_told(tmp_path, capsys):
    from rvos_nb.data import refshapes

    refshapes.write(tmp_path / "data", "valid", "easy", videos=1, seed=4, frames=3, size=SIZE)
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "data"), "it", "--out", str(tmp_path / "out")])
    assert "leave the sentences out" in capsys.readouterr().err


def test_a_slice_without_frames_is_not_saved(result, tmp_path):
    with pytest.raises(Problem, match="a result without frames"):
        result[3:3].save(tmp_path / "none")


def test_files_of_coco_are_those_of_the_folder(tmp_path):
    folder = pictures(tmp_path / "clip", 2)
    found = segment(folder, "it", out=tmp_path / "out")
    for coco in (found.to_coco(), json.loads((tmp_path / "out/masks.json").read_text())):
        assert [i["file_name"] for i in coco["images"]] == ["0.png", "1.png"]


def test_view_of_a_clip_names_its_page(result, capsys):
    rvos("view", result.folder)
    assert str(result.folder / "page.html") in capsys.readouterr().out


def test_a_bar_is_drawn_where_a_terminal_has_no_columns(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((0, 0)))
    assert usual_shape() == {"ncols": 80, "nrows": 24}
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((120, 40)))
    assert usual_shape() == {}


# What could go wrong before the work, and is told before it


def test_a_wrong_propagator_is_told_before_anything_is_asked(film, tmp_path, monkeypatch):
    def ask(self):
        raise AssertionError("asked")

    monkeypatch.setattr(segmentation.Asking, "run", ask)
    for wrong, found in (("aot-tinny", "did you mean"), ("referformer-tiny", "propagates masks")):
        for how in ({"propagate": wrong}, {"propagate": wrong, "every": 3}):
            with pytest.raises(Problem, match=found):
                segment(film, "the red circle", out=tmp_path / "out", **how)


def test_no_result_overwrites_its_own_clip(film, tmp_path):
    own = tmp_path / "overlay.mp4"
    shutil.copy(film, own)
    with pytest.raises(Problem, match=r"the clip itself, overlay\.mp4"):
        segment(own, "the red circle", out=tmp_path)
    assert own.read_bytes() == film.read_bytes()


def test_a_clip_that_lies_in_its_result_goes_with_it(film, tmp_path):
    (tmp_path / "here").mkdir()
    shutil.copy(film, tmp_path / "here/mine.mp4")
    result = segment(tmp_path / "here/mine.mp4", "the red circle", out=tmp_path / "here")
    result.save(tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    assert len([*open_result(tmp_path / "there").pictures()]) == len(result)


def test_a_sentence_that_the_overlay_cannot_write(film, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "name_sentences", lambda texts: ("sentence 1",))
    with pytest.warns(UserWarning, match="it is called 'sentence 1' there"):
        segment(film, "那只狗", out=tmp_path / "out")


# The app


def test_the_app_without_gradio_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as e:
        main(["app"])
    assert e.value.code == 1 and "pip install 'rvos_nb[app]'" in capsys.readouterr().err


def test_the_app_refuses_models_before_it_is_served():
    for names in (("referformer-tinny",), ("referformer-tiny", "soc-tiny"), ("aot-tiny",)):
        with pytest.raises(Problem):
            AppWork(*names)


def test_visitors_do_not_meet(film):
    work, one, two = AppWork(), Visit(), Visit()
    work.answer(str(film), "the red circle", one)
    work.answer(str(film), "the blue square", two)
    assert one.result.sentences != two.result.sentences
    assert one.result.folder.parent != two.result.folder.parent
    with pytest.raises(Problem, match="tokens"):
        work.answer(str(film), "dog " * 2500, one)
    assert one.result.sentences == ["the red circle"] and one.result.folder.is_dir()
