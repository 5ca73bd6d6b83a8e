"""What people bring: films, pictures, masks, folders and results as phones, brushes and other
programs leave them. Each case has its right value, or the words of its message."""

import json
import shutil
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from rvos_nb import cli
from rvos_nb.core import Problem
from rvos_nb.data.check import check_dataset
from rvos_nb.data.index import frame_size
from rvos_nb.data.masks import read_labels, read_mask, read_object_ids, write_labels, write_mask
from rvos_nb.data.pictures import read_frame, read_picture_size
from rvos_nb.data.sequences import find_films, find_pairs, read_pair
from rvos_nb.data.video import frame_rate, frame_times, open_clip, read_video, write_video
from rvos_nb.evaluate import evaluate, evaluate_vos
from rvos_nb.files import write_json
from rvos_nb.propagation import propagate_clip, propagate_vos, read_start_mask
from rvos_nb.results import decode_mask
from rvos_nb.segmentation import segment

TRIALS = Path(__file__).with_name("trials")
H, W = 96, 128
yy, xx = np.mgrid[:H, :W]
DISC = (yy - 30) ** 2 + (xx - 40) ** 2 < 150
WHITE = DISC * np.uint8(255)


def picture(t=0, size=(H, W)):
    "Noise that moves, which no codec makes small."
    rng = np.random.default_rng(t)
    noise = rng.integers(0, 60, (*size, 3), np.uint8)
    noise[8:20, 10 + t : 30 + t] = 220, 30, 30
    return noise


def film(path, frames=20, codec="libx264", size=(H, W), form=None, ticks=None, pixels="yuv420p"):
    with av.open(str(path), "w", format=form, options={"movflags": "faststart"}) as box:
        stream = box.add_stream(codec, rate=10)
        stream.pix_fmt, (stream.height, stream.width) = pixels, size
        stream.options = {"g": "6", "bf": "2"} if codec == "libx264" else {}
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(t, size), format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[t], Fraction(1, 1000)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


def collect(action, *args, **options):
    "What an action gives, and what was assumed."
    with warnings.catch_warnings(record=True, action="always") as caught:
        return action(*args, **options), [str(w.message) for w in caught]


# Films


@pytest.mark.parametrize(
    "name, size, red",
    [
        ("phone.mp4", (96, 128), (30, 30)),
        ("upside.mp4", (128, 96), None),
        ("trimmed.mp4", (96, 128), None),
    ],
)
def test_a_film_is_as_a_player_shows_it(name, size, red):
    clip = open_clip(TRIALS / name)
    frames = list(read_video(clip))
    assert len(frames) == len(clip.frames) and {f.shape[:2] for f in frames} == {size}
    assert frame_size(clip) == size
    backwards = list(read_video(clip, names=clip.frames[::-1]))
    assert all((a == b).all() for a, b in zip(frames, backwards[::-1]))
    if red:
        ys, xs = np.nonzero((frames[0][..., 0] > 150) & (frames[0][..., 1] < 90))
        assert len(ys) and abs(ys.mean() - red[0]) < 20 and abs(xs.mean() - red[1]) < 20


def test_a_film_that_stands_on_its_head():
    with av.open(str(TRIALS / "upside.mp4")) as box:
        stored = next(box.decode(video=0)).to_ndarray(format="rgb24")
    assert (next(read_video(open_clip(TRIALS / "upside.mp4"))) == np.rot90(stored, 2)).all()


def test_a_trimmed_film_has_the_frames_that_decode():
    assert len(open_clip(TRIALS / "trimmed.mp4").frames) == 14


def test_masks_and_overlay_of_a_turned_film(tmp_path):
    from test_protocols import Bright

    segment(open_clip(TRIALS / "phone.mp4"), ["it"], Bright(), tmp_path)
    with Image.open(tmp_path / "Annotations/phone/0/00000.png") as im:
        assert im.size == (128, 96)
    assert next(read_video(open_clip(tmp_path / "overlay.mp4"))).shape == (96, 128, 3)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def punch(path, start, end):
    "Zeros, as an interrupted download leaves them."
    data = path.read_bytes()
    a, b = int(len(data) * start), int(len(data) * end)
    path.write_bytes(data[:a] + bytes(b - a) + data[b:])
    return path


@pytest.mark.parametrize(
    "name, spoil, line",
    [
        ("a.mp4", lambda p: cut(p, 0.6), True),
        ("b.mp4", lambda p: punch(p, 0.6, 1), True),
        ("c.mp4", lambda p: punch(p, 0.4, 0.6), True),
        ("d.mkv", lambda p: cut(p, 0.4), True),
        ("e.ts", lambda p: cut(p, 0.6), False),
    ],
)
def test_a_film_that_breaks_off_gives_what_is_there(tmp_path, name, spoil, line):
    path = spoil(film(tmp_path / name, 40))
    clip, lines = collect(open_clip, path)
    assert 1 < len(clip.frames) < 40 and len(list(read_video(clip))) == len(clip.frames)
    assert len(list(read_video(clip, names=clip.frames[::-1]))) == len(clip.frames)
    assert bool(lines) == line and all("breaks off" in text for text in lines)


def scramble(path, start):
    "Two thousand bytes turned over, as a bad disk leaves them."
    data = bytearray(path.read_bytes())
    a = int(len(data) * start)
    data[a : a + 2000] = bytes(255 - b for b in data[a : a + 2000])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("start", [0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("name", ["a.mp4", "b.mkv"])
def test_a_film_that_is_damaged_in_the_middle_keeps_its_length(tmp_path, name, start):
    whole = list(read_video(open_clip(film(tmp_path / name, 40))))
    clip = open_clip(scramble(tmp_path / name, start))
    frames, lines = collect(list, read_video(clip))
    assert len(frames) == len(clip.frames)
    assert all("does not decode" in text or "breaks off" in text for text in lines)
    backwards, _ = collect(list, read_video(clip, names=clip.frames[::-1]))
    assert len(backwards) == len(frames)
    if len(frames) == 40:  # what stands before and well behind the damage is in its place
        assert (frames[0] == whole[0]).all() and (frames[-1] == whole[-1]).all()


def test_a_frame_that_is_lost_is_the_one_before_it(tmp_path):
    path = film(tmp_path / "a.mp4", 40)
    with av.open(str(path)) as box:
        packet = [p for p in box.demux(video=0) if p.size][20]
    data = bytearray(path.read_bytes())
    at = packet.pos + 4  # behind the length of its first unit: no unit that a decoder knows
    data[at : at + packet.size - 4] = b"\xff" * (packet.size - 4)
    whole = list(read_video(open_clip(path)))
    path.write_bytes(data)
    clip = open_clip(path)
    frames, lines = collect(list, read_video(clip))
    assert len(frames) == len(clip.frames) == 40 and len(lines) == 1
    lost = int(lines[0].split("frame ")[1][:5])
    assert (frames[lost] == frames[lost - 1]).all() and (frames[39] == whole[39]).all()


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "dvd.mp4"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=10)
        stream.pix_fmt, stream.width, stream.height = "yuv420p", 72, 58
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for t in range(3):
            frame = av.VideoFrame.from_ndarray(picture(t, (58, 72)), format="rgb24")
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    clip, lines = collect(open_clip, path)
    assert [f.shape for f in read_video(clip)] == [(58, 72, 3)] * 3 and frame_size(clip) == (58, 72)
    assert len(lines) == 1 and "16:11" in lines[0] and "as the film stores them" in lines[0]


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("b.webm", "libvpx"), ("c.mkv", None)])
def test_other_containers(tmp_path, name, codec):
    clip, lines = collect(open_clip, film(tmp_path / name, codec=codec or "libx264"))
    assert len(clip.frames) == len(list(read_video(clip))) == 20 and not lines


def test_a_variable_rate_keeps_its_clock(tmp_path):
    ticks = [0, 100, 200, 1200, 1300, 2300, 2400, 2500]
    clip = open_clip(film(tmp_path / "v.mp4", 8, ticks=ticks))
    assert [1000 * t for t in frame_times(clip)] == ticks
    labels = np.zeros((H, W), np.uint8)
    labels[8:20, 10:30] = 1
    overlay = propagate_clip(clip, {0: labels}, tmp_path / "out", "aot-tiny")
    assert [1000 * t for t in frame_times(open_clip(overlay))] == ticks


def test_a_constant_rate_is_written_as_before(tmp_path):
    clip = open_clip(film(tmp_path / "c.mp4"))
    assert frame_rate(clip) == 10 and not frame_times(clip)
    for name, times in (("a.mp4", {}), ("b.mp4", {"times": frame_times(clip)})):
        write_video(tmp_path / name, read_video(clip), 10, **times)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def join_streams(folder):
    parts = [film(folder / f"{n}.h264", 4, size=s, form="h264") for n, s in enumerate(SIZES)]
    (folder / "x.h264").write_bytes(b"".join(p.read_bytes() for p in parts))
    return folder / "x.h264"


SIZES = ((H, W), (64, 80))


def write_text(text, name):
    def write(folder):
        film(folder / "secret.mp4", 3)
        film(folder / "secret.ts", 3)
        (folder / name).write_text(text)
        return folder / name

    return write


@pytest.mark.parametrize(
    "make, words",
    [
        (join_streams, "64x80 pixels from frame 00004"),
        (lambda d: film(d / "thin.mp4", 3, size=(2, 2000)), "20 times the shorter"),
        (lambda d: film(d / "tall.mp4", 3, size=(2000, 2)), "20 times the shorter"),
        (write_text("ffconcat version 1.0\nfile secret.mp4\n", "x.ffconcat"), "names other files"),
        (write_text("ffconcat version 1.0\nfile secret.mp4\n", "x.mp4"), "names other files"),
        (
            write_text(
                "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
                "x.m3u8",
            ),
            "names other files",
        ),
        (write_text("words", "x.mp4"), "cannot be decoded"),
        (write_text("", "x.mp4"), "cannot be decoded"),
    ],
)
def test_no_film(tmp_path, capsys, make, words):
    path = make(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli.main(["propagate", str(path), "--mask", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert e.value.code == 1 and words in said and "Traceback" not in said
    assert not (tmp_path / "out" / "Annotations").exists()


def test_a_film_with_alpha_lies_on_white(tmp_path):
    rgba = np.dstack([picture(), np.full((H, W), 255, np.uint8)])
    rgba[50:, :, 3] = 0
    with av.open(str(tmp_path / "a.mov"), "w") as box:
        stream = box.add_stream("qtrle", rate=5)
        stream.pix_fmt, stream.height, stream.width = "argb", H, W
        box.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        box.mux(stream.encode())
    frame = next(read_video(open_clip(tmp_path / "a.mov")))
    assert (frame[50:] == 255).all() and abs(frame[:50].astype(int) - rgba[:50, :, :3]).max() < 3


# Pictures


@pytest.mark.parametrize("mark, rotate", [(3, 180), (6, 90), (8, 270)])
def test_a_picture_of_a_phone(tmp_path, mark, rotate):
    smooth = cv2.GaussianBlur(picture(), (9, 9), 0)
    upright = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x0112] = mark
    for name in ("a.jpg", "b.jpg"):
        upright.rotate(rotate, expand=True).save(tmp_path / name, exif=exif, quality=95)
    clip = open_clip(tmp_path)
    assert abs(next(read_video(clip)).astype(int) - smooth).mean() < 3
    assert frame_size(clip) == read_picture_size(tmp_path / "a.jpg") == (H, W)
    assert next(read_video(open_clip(tmp_path / "a.jpg"))).shape == (H, W, 3)


def test_forms_of_a_frame(tmp_path):
    rgb = picture()
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    cut_out = np.dstack([rgb, WHITE])
    Image.fromarray(cut_out).save(tmp_path / "alpha.png")
    assert (read_frame(tmp_path / "deep.png") == grey[..., None]).all()
    assert read_frame(tmp_path / "cmyk.jpg").shape == (H, W, 3)
    alpha = read_frame(tmp_path / "alpha.png")
    assert (alpha[~DISC] == 255).all() and (alpha[DISC] == rgb[DISC]).all()


# Masks


def soften(mask, most=255):
    return cv2.GaussianBlur(mask * np.uint8(most), (0, 0), 2)


def cut_out(colour):
    return np.dstack([np.full((H, W, 3), colour, np.uint8), WHITE])


def with_palette(values, *colours):
    im = Image.fromarray(values)
    im.putpalette(np.ravel(colours).tolist())
    return im


TWO = np.where(DISC, 1, np.where(xx > 100, 2, 0)).astype(np.uint8)
UNKNOWN = np.where((xx > 90) & (xx <= 100), 255, TWO).astype(np.uint8)
RED = np.array([[0, 0, 0], [230, 10, 10]], np.uint8)[DISC.astype(int)]
TRANSPARENT_BLACK = np.dstack([np.zeros((H, W, 3), np.uint8) + WHITE[..., None], WHITE])

DRAWN = {  # name -> picture, the ids that a person means, words of what is assumed
    "grey 255.png": (WHITE, DISC, ""),
    "grey 1.png": (DISC.astype(np.uint8), DISC, ""),
    "bit.png": (DISC, DISC, ""),
    "soft 255.png": (soften(DISC), DISC, "soft edges"),
    "soft 250.png": (soften(DISC, 250), DISC, "soft edges"),
    "soft 120.png": (soften(DISC, 120), DISC, "soft edges"),
    "smeared.jpg": (WHITE, DISC, "soft edges"),
    "smeared colour.jpg": (RED, DISC, "soft edges"),
    "red.png": (RED, DISC, ""),
    "soft red.png": (np.dstack([soften(DISC), 0 * WHITE, 0 * WHITE]), DISC, "soft edges"),
    "screenshot.png": (np.dstack([WHITE] * 3), DISC, ""),
    "opaque.png": (np.dstack([WHITE] * 3 + [255 + 0 * WHITE]), DISC, ""),
    "cut-out white.png": (cut_out(255), DISC, "opaque part"),
    "cut-out grey.png": (cut_out(90), DISC, "opaque part"),
    "cut-out photo.png": (np.dstack([picture(), WHITE]), DISC, "opaque part"),
    "soft cut-out.png": (np.dstack([picture(), soften(DISC)]), DISC, "soft edges"),
    "eraser.png": (TRANSPARENT_BLACK, DISC, "opaque part"),
    "16 bits.png": (WHITE.astype(np.uint16) * 257, DISC, "16 bits"),
    "soft 16 bits.png": (soften(DISC).astype(np.uint16) * 257, DISC, "soft edges"),
    "16 bits of ids.png": (TWO.astype(np.uint16), TWO, ""),
    "ids.png": (TWO, TWO, ""),
    "ids and 255.png": (UNKNOWN, UNKNOWN, ""),
    "palette.png": (with_palette(TWO, [0] * 3, [200, 0, 0], [0, 200, 0]), TWO, ""),
    "black and white palette.png": (
        with_palette(1 * DISC.view(np.uint8), [0] * 3, [255] * 3),
        DISC,
        "",
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_mask_is_read_as_it_was_meant(tmp_path, name):
    drawn, meant, words = DRAWN[name]
    im = drawn if isinstance(drawn, Image.Image) else Image.fromarray(drawn)
    im.save(tmp_path / name)
    ids, lines = collect(read_start_mask, tmp_path / name, (H, W))
    assert (ids != meant).mean() < 0.003 and set(np.unique(ids)) == set(np.unique(meant * 1))
    assert words in "".join(lines) and bool(lines) == bool(words)
    mask, _ = collect(read_mask, tmp_path / name, (H, W))
    assert (mask == (ids > 0)).all(), "two readers, two answers"
    Image.fromarray(picture()).save(tmp_path / "frame.jpg")
    pair, _ = collect(read_pair, tmp_path / "frame.jpg", tmp_path / name)
    assert (pair[1] == ids).mean() > 0.999, "training reads it otherwise"
    data = (tmp_path / name).read_bytes()
    if data[1:4] == b"PNG" and data[24] != 16:
        assert (decode_mask(data, name)[0] == mask).all(), "evaluation reads it otherwise"


REFUSED = {
    "white first.png": (with_palette(np.uint8(~DISC), [255] * 3, [0] * 3), "entry 0 is not black"),
    "sorted.png": (with_palette(TWO, [0, 128, 0], [128, 0, 0], [0] * 3), "entry 0 is not black"),
    "no black.png": (with_palette(TWO, [250, 250, 250], [128, 0, 0], [0, 128, 0]), "not black"),
    "two greys.png": (np.uint8([0, 128, 255])[TWO], "greys 128, 255"),
    "two colours.png": (np.uint8([[0, 0, 0], [200, 0, 0], [0, 200, 0]])[TWO], "2 colours"),
    "two soft colours.png": (
        cv2.GaussianBlur(np.uint8([[0, 0, 0], [200, 0, 0], [0, 200, 0]])[TWO], (5, 5), 0),
        "2 colours",
    ),
    "photo.png": (cv2.GaussianBlur(picture()[..., 1] * np.uint8(4), (5, 5), 0), "photograph"),
    "ids above 255.png": (TWO.astype(np.uint16) * 700, "16 bits"),
    "empty.png": (0 * WHITE, "no object"),
    "other size.png": (WHITE[:50], "50x128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_may_mean_several_things_is_refused(tmp_path, name):
    drawn, words = REFUSED[name]
    im = drawn if isinstance(drawn, Image.Image) else Image.fromarray(drawn)
    im.save(tmp_path / name)
    with pytest.raises(Problem, match=words):
        read_start_mask(tmp_path / name, (H, W))


def test_maps_of_data_sets_are_read_exactly(tmp_path):
    "Thin objects, many objects, a speck of 255: whatever lies in a palette or in small greys."
    rng = np.random.default_rng(0)
    thin = np.where(yy % 9 == 0, yy // 9 + 1, 0).astype(np.uint8)
    tiles = (yy // 8 * 16 + xx // 8).astype(np.uint8)
    specks = np.where(rng.random((H, W)) < 0.01, 2, DISC).astype(np.uint8)
    for n, labels in enumerate((thin, tiles, specks, UNKNOWN, TWO, 0 * TWO)):
        write_labels(tmp_path / "map.png", labels)
        found, lines = collect(read_labels, tmp_path / "map.png")
        assert (found == labels).all() and not lines, n
        Image.fromarray(labels).save(tmp_path / "grey.png")
        found, lines = collect(read_labels, tmp_path / "grey.png")
        assert (found == labels).all() and not lines, n


def test_a_full_palette_may_begin_with_any_colour(tmp_path):
    "As some published annotations do; then nothing is shown in black."
    colours = [[255, 0, 0], [0, 0, 139], [255, 255, 84], *([n, n, n] for n in range(4, 257 - 3))]
    im = with_palette(TWO, *np.clip(colours + [[255] * 3] * 3, 0, 255))
    im.save(tmp_path / "map.png")
    for read in (read_labels, read_object_ids):
        found, lines = collect(read, tmp_path / "map.png")
        assert (found == TWO).all() and not lines


def test_training_cuts_greys_of_published_pictures(tmp_path):
    greys = np.uint8([0, 85, 170])[TWO]
    Image.fromarray(np.maximum(greys, 255 * (yy > 90)).astype(np.uint8)).save(tmp_path / "m.png")
    assert (read_object_ids(tmp_path / "m.png", cut=True) == ((greys > 127) | (yy > 90))).all()


# Folders


def test_companions_capitals_and_numbers(tmp_path):
    for t in (9, 10, 11):
        Image.fromarray(picture(t)).save(tmp_path / f"{t}.{'JPG' if t > 9 else 'Jpeg'}", "JPEG")
        (tmp_path / f"._{t}.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".DS_Store").touch()
    clip = open_clip(tmp_path)
    assert clip.frames == ("9", "10", "11") and len(list(read_video(clip))) == 3


def test_companions_in_training_data(tmp_path):
    for n in range(3):
        Image.fromarray(picture(n)).save(tmp_path / f"p{n}.jpg")
        write_mask(tmp_path / f"p{n}.png", DISC)
        for suffix in ("jpg", "png"):
            (tmp_path / f"._p{n}.{suffix}").touch()
    assert [p.name for p, _ in find_pairs(str(tmp_path))] == ["p0.jpg", "p1.jpg", "p2.jpg"]
    films = tmp_path / "films"
    for t in (9, 10):
        write_labels(films / f"Annotations/v/{t}.png", TWO)
        (films / f"Annotations/v/._{t}.png").touch()
        (films / "JPEGImages/v").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(t)).save(films / f"JPEGImages/v/{t}.JPG", "JPEG")
    assert [(p.name, m.name) for p, m in find_films(str(films))[0]] == [
        ("9.JPG", "9.png"),
        ("10.JPG", "10.png"),
    ]


# Objects given by masks


@pytest.fixture
def davis(tmp_path):
    "Two videos: one of five frames, one of two."
    root = tmp_path / "davis"
    for v, count in (("long", 5), ("short", 2)):
        for t in range(count):
            name = f"{t:05d}"
            for tree in (root / "Annotations/480p", tmp_path / "run/Annotations"):
                write_labels(tree / v / f"{name}.png", DISC.astype(np.uint8))
                (tree / v / f"._{name}.png").write_bytes(b"\0\5\x16\7")
            pictures = root / "JPEGImages/480p" / v
            pictures.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(t)).save(pictures / f"{name}.jpg")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("long\nshort\n")
    return root


def test_an_odd_video_costs_itself(davis):
    result = evaluate_vos(davis, davis.parent / "run")
    assert result["J&F"] == 100 and result["objects"] == 1
    assert "2 frames" in result["unscored"]["short"]
    (davis / "Annotations/480p/long/00002.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match="no object with frames"):
        evaluate_vos(davis, davis.parent / "run")


def test_a_video_without_annotation_costs_itself(davis):
    shutil.rmtree(davis / "Annotations/480p/short")
    report = propagate_vos(davis, davis.parent / "out", "aot-tiny", direction="forward")
    assert report.done == ["long"] and "no annotation" in report.failed["short"]


def test_davis_2016(davis):
    "One object, in white."
    for p in (davis / "Annotations/480p/long").glob("[!.]*.png"):
        write_mask(p, DISC)
    report = propagate_vos(davis, davis.parent / "out", "aot-tiny")
    first = read_labels(davis.parent / "out/Annotations/long/00000.png")
    assert not report.failed and set(np.unique(first)) == {0, 1}
    assert evaluate_vos(davis, davis.parent / "run")["J"] == 100
    for p in (davis.parent / "run/Annotations/long").glob("[!.]*.png"):
        write_mask(p, DISC)
    assert evaluate_vos(davis, davis.parent / "run")["J"] == 100


def test_the_layout_of_davis_2016(davis):
    "Its listing has a line for each frame, and masks are white."
    shutil.rmtree(davis / "ImageSets")
    (davis / "ImageSets/480p").mkdir(parents=True)
    folders = ("/JPEGImages/480p/long/{}.jpg", "/Annotations/480p/long/{}.png")
    names = [p.stem for p in sorted((davis / "JPEGImages/480p/long").glob("*.jpg"))]
    lines = [" ".join(folders).format(name, name) for name in names]
    (davis / "ImageSets/480p/val.txt").write_text("\n".join(lines))
    for p in (davis / "Annotations/480p/long").glob("[!.]*.png"):
        write_mask(p, DISC)
    report = propagate_vos(davis, davis.parent / "out", "aot-tiny")
    assert report.done == ["long"] and not report.failed
    result = evaluate_vos(davis, davis.parent / "run")
    assert result["J"] == 100 and result["objects"] == 1


# Results


@pytest.fixture
def scored(tmp_path):
    "A data set of two videos, and a run that is right."
    videos = {}
    for v in ("aa", "bb"):
        (tmp_path / f"data/valid/JPEGImages/{v}").mkdir(parents=True)
        for t in range(3):
            Image.fromarray(picture(t)).save(tmp_path / f"data/valid/JPEGImages/{v}/{t:05d}.jpg")
            write_labels(tmp_path / f"data/valid/Annotations/{v}/{t:05d}.png", TWO)
            for e in range(2):
                write_mask(tmp_path / f"run/Annotations/{v}/{e}/{t:05d}.png", e + 1 == TWO)
        videos[v] = {
            "expressions": {str(e): {"exp": "it", "obj_id": str(e + 1)} for e in range(2)},
            "frames": [f"{t:05d}" for t in range(3)],
        }
    write_json(tmp_path / "data/meta_expressions/valid/meta_expressions.json", {"videos": videos})
    return tmp_path


def put(scored, *places):
    for place in places:
        shutil.copytree(scored / "run/Annotations", scored / place)
    return scored / Path(places[0]).parts[0]


def pack(scored, around):
    with zipfile.ZipFile(scored / "x.zip", "w") as box:
        for p in sorted((scored / "run/Annotations").rglob("*.png")):
            box.write(p, around + str(p.relative_to(scored / "run/Annotations")))
    return scored / "x.zip"


def empty(scored, place):
    (scored / place).mkdir(parents=True)
    return scored / Path(place).parts[0]


def label_maps(scored):
    for v in ("aa", "bb"):
        for t in range(3):
            write_labels(scored / f"maps/{v}/{t:05d}.png", TWO)
    return scored / "maps"


def unreadable(scored):
    for p in (scored / "run").rglob("*.png"):
        p.write_bytes(b"")
    return scored / "run"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda s: s / "run", ""),
        (lambda s: s / "run/Annotations", ""),
        (lambda s: put(s, "out/valid/Annotations"), ""),
        (lambda s: put(s, "out/valid"), ""),
        (lambda s: put(s, "out/a/b/Annotations"), ""),
        (lambda s: put(s, "out/Annotations/valid"), ""),
        (lambda s: put(s, "out/x/Annotations", "out/y/Annotations"), "one tree of masks"),
        (lambda s: pack(s, ""), ""),
        (lambda s: pack(s, "Annotations/"), ""),
        (lambda s: pack(s, "masks/"), "a folder around the videos"),
        (lambda s: pack(s, "valid/Annotations/"), "a folder around Annotations"),
        (lambda s: pack(s, "a/b/Annotations/"), "a folder around Annotations"),
        (lambda s: empty(s, "out"), "none of the 2 videos"),
        (lambda s: empty(s, "out/Annotations"), "none of the 2 videos"),
        (lambda s: empty(s, "out/Annotations/aa/0"), "not one usable mask"),
        (lambda s: empty(s, "out/Annotations/other"), "but other"),
        (label_maps, "not one usable mask"),
        (unreadable, "not one usable mask"),
    ],
)
def test_a_score_never_means_that_nothing_was_found(scored, capsys, make, words):
    run, out = make(scored), scored / "scores"
    argv = ["evaluate", str(scored / "data"), str(run), "--out", str(out)]
    if not words:
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        assert not e.value.code
        assert json.loads((out / "scores.json").read_text())["J&F"] == 100
        return
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    said = capsys.readouterr()
    assert e.value.code == 1 and words in said.err and "J&F" not in said.out


def test_a_list_without_sentences(scored, capsys):
    path = scored / "data/meta_expressions/valid/meta_expressions.json"
    write_json(path, {"videos": {"aa": {"expressions": {}, "frames": ["00000"]}}})
    with pytest.raises(SystemExit) as e:
        cli.main(
            ["evaluate", str(scored / "data"), str(scored / "run"), "--out", str(scored / "s")]
        )
    assert e.value.code == 1 and "no usable sentence" in capsys.readouterr().err


def test_one_missing_video_still_scores_zero(scored):
    shutil.rmtree(scored / "run/Annotations/bb")
    result = evaluate(scored / "data", scored / "run")
    assert result["J"] == 50 and len(result["missing"]) == 2


def test_check_passes_over_companions(scored):
    before = check_dataset(scored / "data")
    for p in sorted((scored / "data/valid").rglob("*.*g")):
        p.with_name(f"._{p.name}").write_bytes(b"\0\5\x16\7")
    assert check_dataset(scored / "data") == before
