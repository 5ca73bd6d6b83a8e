"""Members: the same opinion in every form,
files that are hostile or broken, conversion, and worker processes."""

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rvos_nb.candidates import draw_masks, resize_logits, save_candidates
from rvos_nb.core import Problem
from rvos_nb.data.masks import encode_mask, read_mask, write_tree
from rvos_nb.files import read_json, write_json
from rvos_nb.keyframe import as_json
from rvos_nb.members import (
    HALF,
    convert_predictions,
    draw_votes,
    foreground,
    open_member,
    probability,
    quantise,
)
from rvos_nb.units import map_units

NAMES, SIZE, SMALL = ["00000", "00005", "00010", "00015"], (48, 64), (12, 16)
IDS = [("a", "0"), ("a", "1"), ("b", "10")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three sentences of two videos in every form; `small[v, e]` are the logits behind them."
    root, rng = tmp_path_factory.mktemp("members"), np.random.default_rng(4)
    small = {k: rng.normal(-1, 3, (4, *SMALL)).astype(np.float32) for k in IDS}
    scores = {k: rng.random(4).round(3) for k in IDS}
    shards = {"a": {}, "b": {}}
    for (v, e), x in small.items():
        save_candidates(
            root / f"run/candidates/{v}/{e}.safetensors",
            x,
            scores[v, e],
            np.zeros((4, 4)),
            {"kind": "logit", "size": list(SIZE), "model": "toy", "frames": NAMES},
        )
        (root / f"run/Annotations/{v}/{e}").mkdir(parents=True)
        write_tree(root / f"run/Annotations/{v}/{e}", NAMES, draw_masks(x, SIZE))
        shards[v][e] = {
            "mask_logits": torch.from_numpy(resize_logits(x, SIZE)),
            "class_info": scores[v, e].tolist(),
        }
    (root / "soft").mkdir()
    (root / "soft/candidates").symlink_to(root / "run/candidates")
    for name, folder in (("with.zip", root / "run"), ("without.zip", root / "run/Annotations")):
        with zipfile.ZipFile(root / name, "w") as box:
            for p in sorted(folder.rglob("*.png")):
                box.write(p, p.relative_to(folder))
    torch.save(shards, root / "all.pth")
    torch.save(shards, root / "old.pth", _use_new_zipfile_serialization=False)
    (root / "parts").mkdir()
    for i, v in enumerate(shards):
        torch.save({v: shards[v]}, root / f"parts/m{i}.pth")
    torch.save({}, root / "parts/m2.pth")
    torch.save(
        {
            v: {e: d | {"mask_logits": d["mask_logits"].sigmoid()} for e, d in es.items()}
            for v, es in shards.items()
        },
        root / "soft.pth",
    )
    return root, small, scores


FORMS = (
    "run",
    "run/Annotations",
    "soft",
    "with.zip",
    "without.zip",
    "all.pth",
    "old.pth",
    "parts",
    "soft.pth",
)


@pytest.mark.parametrize("form", FORMS)
def test_one_opinion_in_every_form(made, form):
    root, small, scores = made
    with open_member(root / form) as m, open_member(root / form) as again:
        for (v, e), x in small.items():
            want = draw_masks(x, SIZE)
            assert (m.opinion(v, e, NAMES) == want).all() and (
                m.opinion(v, e, NAMES, size=SIZE) == want
            ).all()
            soft = m.opinion(v, e, NAMES, "mean")
            assert soft.dtype == np.float32 and np.allclose(
                soft,
                want
                if "nn" in form or "zip" in form
                else probability(resize_logits(x, SIZE), "logit"),
                atol=1e-6,
            )
            assert (soft > 0.5).astype(bool).tolist() == want.tolist()
            known = m.scores(v, e, NAMES)
            assert (
                known is None if "nn" in form or "zip" in form else np.allclose(known, scores[v, e])
            )
        best = {v: {e: int(scores[v, e].argmax()) for w, e in IDS if w == v} for v in "ab"}
        assert m.key_frames() == ({} if "nn" in form or "zip" in form else best)
        with ThreadPoolExecutor(8) as pool:
            assert all(
                (a == draw_masks(small[k], SIZE)).all()
                for k, a in zip(IDS * 4, pool.map(lambda k: m.opinion(*k, NAMES), IDS * 4))
            )
        copy = pickle.loads(pickle.dumps(again))
        assert (
            copy.where == m.where
            and (copy.opinion("b", "10", NAMES) == draw_masks(small["b", "10"], SIZE)).all()
        )
        copy.__exit__()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "asked, said",
    [
        ({"video": "c"}, "c/0"),
        ({"expression": "7"}, "a/7"),
        ({"size": (48, 60)}, "48x64"),
        ({"frames": [*NAMES, "00020"]}, "00020|4 frames"),
        ({"frames": NAMES[:3]}, "4 frames"),
        ({"video": "../a"}, "id"),
        ({"mode": "max"}, "mode"),
    ],
)
def test_what_a_member_cannot_answer(made, form, asked, said):
    root, *_ = made
    if asked.get("frames") == NAMES[:3] and "pth" not in form and form != "parts":
        pytest.skip("known by name")
    with open_member(root / form) as m:
        with pytest.raises(Problem, match=said) as e:
            m.opinion(**{"video": "a", "expression": "0", "frames": NAMES} | asked)
        if "mode" not in asked:
            assert str(root) in str(e.value)


def test_frames_are_asked_for_by_name(made):
    root, small, _ = made
    some = NAMES[::-1][:2]
    for form in ("run", "soft", "with.zip"):
        with open_member(root / form) as m:
            assert (m.opinion("a", "0", some) == draw_masks(small["a", "0"], SIZE)[[3, 2]]).all()


def test_key_frames_on_file_win(made, tmp_path):
    root, *_ = made
    (tmp_path / "candidates").symlink_to(root / "run/candidates")
    write_json(tmp_path / "key_frame.json", as_json({"a": {"0": 2}}))
    assert open_member(tmp_path).key_frames() == {"a": {"0": 2}}


@pytest.mark.parametrize("kind", ["grey", "ones", "bit", "palette", "rgb", "pillow"])
def test_pngs_of_others(tmp_path, kind):
    rng = np.random.default_rng(1)
    masks = rng.random((4, *SIZE)) > 0.7
    (tmp_path / "v/0").mkdir(parents=True)
    for name, mask in zip(NAMES, masks):
        grey = mask.astype(np.uint8)
        pixels = {
            "grey": grey * 200,
            "ones": grey,
            "bit": mask,
            "pillow": grey * 255,
            "rgb": np.repeat(grey[..., None], 3, 2) * 255,
            "palette": grey * 3,
        }[kind]
        im = Image.fromarray(pixels)
        if kind == "palette":
            im.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        im.save(tmp_path / f"v/0/{name}.png")
    with open_member(tmp_path) as m:
        assert (m.opinion("v", "0", NAMES, size=SIZE) == masks).all() and (
            m.opinion("v", "0", NAMES, "mean") == masks
        ).all()
        assert len(m.notes) == (kind not in ("pillow",))


@pytest.mark.parametrize("seed", range(12))
def test_plain_pngs_are_read_as_pillow_reads_them(tmp_path, seed):
    "The quick reader: any size, any values, and any byte changed."
    import io

    rng = np.random.default_rng(seed)
    m = rng.random(rng.integers(1, 70, 2)) > rng.random()
    png = encode_mask(m)
    assert (
        png == encode_mask(m)
        and (np.asarray(Image.open(io.BytesIO(png))) == m * np.uint8(255)).all()
        and (read_mask(io.BytesIO(png)) == m).all()
    )
    for k in rng.integers(0, len(png), 30):
        hurt = png[:k] + bytes([png[k] ^ int(rng.integers(1, 256))]) + png[k + 1 :]
        with pytest.raises(Problem):
            read_mask(io.BytesIO(hurt))
    for k in (8, 20, len(png) // 2):
        with pytest.raises(Problem):
            read_mask(io.BytesIO(png[:k]))


def test_zips_that_must_not_be_read(tmp_path):
    for name, member in (
        ("slip.zip", "../v/0/00000.png"),
        ("deep.zip", "x/Annotations/v/0/00000.png"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as box:
            box.writestr(member, encode_mask(np.ones((2, 2), bool)))
        with pytest.raises(Problem, match=name):
            open_member(tmp_path / name)
    (tmp_path / "text.zip").write_text("no")
    for name in ("text.zip", "nowhere", "nowhere.pth"):
        with pytest.raises(Problem, match=name):
            open_member(tmp_path / name)


class Canary:
    "Unpickled, it makes a folder."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Setter:
    "Unpickled, it asks to set attributes of what the reader hands out."

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (), {"__doc__": "mine"}


@pytest.mark.parametrize("archive", [True, False])
def test_no_code_is_run(tmp_path, archive):
    good = {"mask_logits": torch.zeros(1, 2, 2), "class_info": [0.5]}
    for i, evil in enumerate(
        (
            Canary(str(tmp_path / "ran")),
            {"v": {"0": good | {"x": Canary(str(tmp_path / "ran"))}}},
            Setter(),
            {"v": {"0": {"mask_logits": np.zeros((1, 2, 2))}}},
            {"v": {"0": good | {"f": print}}},
        )
    ):
        torch.save(evil, tmp_path / f"{i}.pth", _use_new_zipfile_serialization=archive)
        with pytest.raises(Problem, match=f"{i}.pth"):
            open_member(tmp_path / f"{i}.pth")
    assert not (tmp_path / "ran").exists()
    torch.save(
        {"v": {"0": good | {"epoch": np.float64(3), "more": (1, "x", None)}}},
        tmp_path / "good.pth",
        _use_new_zipfile_serialization=archive,
    )
    assert open_member(tmp_path / "good.pth").scores("v", "0", ["x"]) == np.float32(0.5)


def test_files_cut_short_anywhere(made, tmp_path):
    root, _, _ = made
    for name in ("all.pth", "old.pth"):
        data = (root / name).read_bytes()
        for k in [0, 1, 5, 100, 500, len(data) // 2, len(data) - 1000, len(data) - 1]:
            (tmp_path / "cut.pth").write_bytes(data[:k])
            with pytest.raises(Problem, match=r"cut\.pth"):
                open_member(tmp_path / "cut.pth")


@pytest.mark.parametrize("seed", range(40))
def test_files_with_changed_bytes(made, tmp_path, seed):
    "The structure of a file is hit in a few places: a `Problem`, or an answer of the right form."
    root, *_ = made
    rng = np.random.default_rng(seed)
    data = bytearray((root / ("all.pth" if seed % 2 else "old.pth")).read_bytes())
    at = data.find(b"mask_logits") - 60
    for _ in range(3):
        data[at + int(rng.integers(0, 400))] = int(rng.integers(0, 256))
    (tmp_path / "hurt.pth").write_bytes(data)
    try:
        with open_member(tmp_path / "hurt.pth") as m:
            for k in IDS:
                assert m.opinion(*k, NAMES).dtype == bool
    except Problem as e:
        assert "hurt.pth" in str(e)


def test_tensors_that_lie_about_their_place(tmp_path):
    "Shapes and strides that reach out of the storage, or make much out of little."
    x = torch.zeros(2, 3, 4)
    storage = torch.storage.TypedStorage(
        wrap_storage=x.untyped_storage(), dtype=x.dtype, _internal=True
    )

    class Lie:
        "Pickles as a tensor that says of itself what it is told to."

        def __init__(self, size=(2, 3, 4), stride=(12, 4, 1), storage_offset=0):
            self.claim = (storage, storage_offset, size, stride, False, {})

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, self.claim

    for i, lie in enumerate(
        (
            {"size": (2, 3, 5)},
            {"storage_offset": 1},
            {"stride": (12, 4, 2)},
            {"size": (2, 3000, 4000), "stride": (0, 0, 0)},
            {"size": (2, 3, 0)},
            {"size": (2, 12), "stride": (12, 1)},
            {"stride": (-12, 4, 1)},
        )
    ):
        torch.save({"v": {"0": {"mask_logits": Lie(**lie)}}}, tmp_path / f"{i}.pth")
        with pytest.raises(Problem, match=f"{i}.pth"):
            open_member(tmp_path / f"{i}.pth").opinion("v", "0", ["a", "b"])


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_views_and_other_numbers(tmp_path, archive, dtype):
    base = (torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    views = {
        "plain": base[:, 1],
        "turned": base[:, 2].transpose(1, 2),
        "steps": base[::2, 3, 1:, ::2],
        "whole": base[0],
    }
    torch.save(
        {"v": {k: {"mask_logits": x, "class_info": [0.0] * len(x)} for k, x in views.items()}},
        tmp_path / "v.pth",
        _use_new_zipfile_serialization=archive,
    )
    with open_member(tmp_path / "v.pth") as m:
        for k, x in views.items():
            assert (
                m.opinion("v", k, [str(i) for i in range(len(x))])
                == (x.float().sigmoid() > 0.5).numpy()
            ).all()


def test_shards(made, tmp_path):
    root, *_ = made
    for name in ("m0", "m1"):
        os.link(root / f"parts/{name}.pth", tmp_path / f"{name}.pth")
    assert open_member(tmp_path).key_frames().keys() == {"a", "b"}
    os.link(root / "parts/m0.pth", tmp_path / "m7.pth")
    with pytest.raises(Problem, match=r"m7\.pth.*video a.*m0\.pth"):
        open_member(tmp_path)
    (tmp_path / "m7.pth").rename(tmp_path / "other.pth")
    with pytest.raises(Problem, match="several models"):
        open_member(tmp_path)


def test_kinds(made):
    root, *_ = made
    with open_member(root / "soft.pth") as a, open_member(root / "all.pth", "logit") as b:
        assert "probabilities" in a.notes["kind"] and not b.notes
    for kind in ("probability", "odds"):
        with pytest.raises(Problem):
            open_member(root / "all.pth", kind)
    with open_member(root / "soft.pth", "logit") as told:
        assert told.opinion("a", "0", NAMES).all() and "as told" in told.notes["kind"]


@pytest.mark.parametrize("seed", range(8))
def test_votes_are_the_published_rule(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        h, w, times = *rng.integers(1, 40, 2), 2 ** rng.integers(0, 5, 2)
        x = rng.normal(rng.choice([0, -3]), 10.0 ** rng.integers(-9, 3), (2, h, w)).astype(
            np.float32
        )
        if rng.random() < 0.5:
            x[rng.random(x.shape) < 0.4] = rng.choice(np.float32([0, HALF, -HALF, 9e-8, -1e-30]))
        size = (
            (int(h * times[0]), int(w * times[1]))
            if rng.random() < 0.8
            else tuple(int(k) for k in rng.integers(1, 90, 2))
        )
        full = torch.nn.functional.interpolate(
            torch.from_numpy(x)[None], size=size, mode="bilinear", align_corners=False
        )[0]
        assert (draw_votes(x, size) == (full.sigmoid() > 0.5).numpy()).all(), (x.shape, size)
        p = full.sigmoid().numpy()
        assert ((quantise(p, "probability") >= 128) == (p > 0.5)).all() and (
            (quantise(full.numpy(), "logit") >= 128) == foreground(full.numpy(), "logit")
        ).all()


@pytest.mark.parametrize("name", ["all.pth", "soft.pth", "parts"])
def test_conversion(made, tmp_path, name):
    root, small, scores = made
    report = convert_predictions(root / name, tmp_path / "out")
    assert report.done == ["a", "b"] and read_json(tmp_path / "out/key_frame.json") == as_json(
        {v: {e: int(scores[v, e].argmax()) for w, e in IDS if w == v} for v in "ab"}
    )
    with open_member(tmp_path / "out") as m:
        for k, x in small.items():
            assert (m.opinion(*k, NAMES) == draw_masks(x, SIZE)).all() and np.allclose(
                m.scores(*k, NAMES), scores[k]
            )
            assert (
                abs(
                    m.opinion(*k, NAMES, "mean") - probability(resize_logits(x, SIZE), "logit")
                ).max()
                < 1 / 500
            )
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    next((tmp_path / "out/Annotations/a").rglob("*.png")).unlink()
    assert convert_predictions(root / name, tmp_path / "out").done == ["a"] and before == {
        p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }


def test_conversion_with_names(made, tmp_path):
    root, small, _ = made
    listing = {
        v: {
            "expressions": {e: {"exp": "it"} for w, e in IDS if w == v},
            "frames": NAMES if v == "a" else NAMES[:3],
        }
        for v in "ab"
    }
    write_json(tmp_path / "data/meta_expressions/valid/meta_expressions.json", {"videos": listing})
    for v in "ab":
        (tmp_path / "data/valid/JPEGImages" / v).mkdir(parents=True)
    report = convert_predictions(root / "all.pth", tmp_path / "out", data_dir=tmp_path / "data")
    assert (
        report.done == ["a"]
        and "4 frames" in report.failed["b"]
        and (
            read_mask(tmp_path / "out/Annotations/a/0/00015.png")
            == draw_masks(small["a", "0"], SIZE)[3]
        ).all()
    )
    with pytest.raises(Problem, match="no conversion"):
        convert_predictions(root / "run", tmp_path / "other")


def test_conversion_needs_no_more_than_a_sentence(tmp_path):
    "A file of 80 MB is converted in a process that may not take 80 MB more."
    x = torch.full((40, 500, 1000), -3.0)
    x[:, 100:200, 100:200] = 3
    torch.save(
        {
            f"v{i}": {"0": {"mask_logits": x[i : i + 10], "class_info": [0.5] * 10}}
            for i in range(4)
        },
        tmp_path / "m.pth",
    )
    code = """if 1:
        import resource, sys
        from rvos_nb.members import convert_predictions
        import scipy.special, safetensors.numpy
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert_predictions(sys.argv[1], sys.argv[2]).check()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    grown = int(
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "m.pth", tmp_path / "out"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
    )
    assert grown < 78_000


# Worker processes: functions that a fresh interpreter finds


def _mark(unit, folder):
    "Write a file; some units fail, each in its own way."
    if unit == "slow":
        time.sleep(0.5)
    if unit == "problem":
        raise Problem("unit", "nothing", "something", "do it")
    if unit == "odd":
        raise Odd(1, 2)
    if unit == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / unit).write_text(unit)
    if unit == "later":
        return lambda: (Path(folder) / "later").write_text("written")


class Odd(Exception):
    "Cannot be pickled back."

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class Work:
    "Picklable by this file, whatever pytest calls it."

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, unit):
        return _mark(unit, self.folder)


def test_processes_keep_order_and_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    units = ["slow", "a", "problem", "odd", "killed", "later", "b"]
    import test_members

    ends = list(map_units(test_members.Work(tmp_path), units, "processes:2"))
    assert [u for u, _ in ends] == units
    errors = dict(ends)
    assert [errors[u] for u in ("slow", "a", "later", "b")] == [None] * 4 and str(
        errors["problem"]
    ) == "unit: found nothing; expected something; do it"
    assert (
        "Odd: 1 and 2" in str(errors["odd"])
        and "exit code -9" in str(errors["killed"])
        and (tmp_path / "later").read_text() == "written"
    )
    assert list(map_units(int, [], "processes:2")) == []


def test_processes_end_with_their_parent_and_on_ctrl_c(tmp_path):
    code = f"""
import os, time
from pathlib import Path
from rvos_nb.units import map_units

def sleep(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    list(map_units(sleep, [{str(tmp_path)!r}] * 2, "processes:2"))
"""
    (tmp_path / "main.py").write_text(code)
    for number, word in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, "")):
        run = subprocess.Popen(
            [sys.executable, tmp_path / "main.py"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # jobs in the background of a shell are born deaf to Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.time() + 60
        while (
            len(pids := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]) < 2
            and time.time() < deadline
        ):
            time.sleep(0.05)
        assert len(pids) == 2
        os.kill(run.pid, number)
        assert word in run.communicate(timeout=30)[1]
        while (
            any(
                Path(f"/proc/{p}").exists()
                and "\nState:\tZ" not in Path(f"/proc/{p}/status").read_text()
                for p in pids
            )
            and time.time() < deadline
        ):
            time.sleep(0.05)
        assert time.time() < deadline
        for p in pids:
            (tmp_path / str(p)).unlink()


def test_fusion_by_two_processes_gives_the_same_bytes(made, tmp_path):
    "Members of four kinds are sent to the workers by their paths."
    from rvos_nb.fuse import fuse

    root, *_ = made
    write_json(
        tmp_path / "data/meta_expressions/valid/meta_expressions.json",
        {
            "videos": {
                v: {"expressions": {e: {"exp": "it"} for w, e in IDS if w == v}, "frames": NAMES}
                for v in "ab"
            }
        },
    )
    for v in "ab":
        (tmp_path / "data/valid/JPEGImages" / v).mkdir(parents=True)
        for f in NAMES:
            Image.new("RGB", SIZE[::-1]).save(tmp_path / "data/valid/JPEGImages" / v / f"{f}.jpg")
    for how in ("local", "processes:2"):
        fuse(
            tmp_path / "data",
            [root / m for m in ("run", "with.zip", "parts", "soft.pth")],
            tmp_path / how,
            groups="pairs",
            executor=how,
        ).check()
    found = {
        p.relative_to(tmp_path / "local"): p.read_bytes()
        for p in (tmp_path / "local").rglob("*")
        if p.is_file()
    }
    assert (
        found
        == {
            p.relative_to(tmp_path / "processes:2"): p.read_bytes()
            for p in (tmp_path / "processes:2").rglob("*")
            if p.is_file()
        }
        and sum(p.suffix == ".png" for p in found) == 12
    )


def test_the_command(made, tmp_path, capsys):
    from rvos_nb.cli import main

    root, *_ = made
    with pytest.raises(SystemExit) as e:
        main(
            [
                "convert",
                "--predictions",
                str(root / "all.pth"),
                str(tmp_path / "out"),
                "--kind",
                "logit",
            ]
        )
    assert (
        not e.value.code
        and "2 done" in capsys.readouterr().out
        and len(list((tmp_path / "out").rglob("*.png"))) == 12
    )
    for argv in (
        ["convert", str(root / "all.pth"), "x", "--kind", "logit"],
        ["convert", "--predictions", str(root / "run"), str(tmp_path / "x")],
        [
            "convert",
            "--predictions",
            str(root / "all.pth"),
            str(tmp_path / "x"),
            "--kind",
            "probability",
        ],
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 1 and capsys.readouterr().err.count("\n") == 1
