"""Files that ask for too much, and files that point elsewhere: each is refused in one line, in a
process that may not grow. The words of each message stand beside the case."""

import errno
import json
import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from rvos_nb.bounds import MOST_STRUCTURE, keep_offline
from rvos_nb.core import Problem
from rvos_nb.data.masks import read_labels, read_mask
from rvos_nb.data.pictures import MOST_PIXELS, read_frame, read_picture_size
from rvos_nb.data.prepare import read_plain_pickle
from rvos_nb.data.samples import read_h5_masks, read_mat_masks
from rvos_nb.data.video import open_clip
from rvos_nb.files import find_files
from rvos_nb.keyframe import read_key_frames
from rvos_nb.models.files import read_pickle
from rvos_nb.predictions import Predictions
from rvos_nb.results import decode_mask, open_results
from rvos_nb.run_state import read_work_record
from rvos_nb.sources import Sources
from rvos_nb.stage import Execution, StageWork, locked, read_record, run_stage
from rvos_nb.verify.hostile import (
    PICKLES,
    list_hostile,
    make_chunk,
    make_png,
    offer_file,
    pack_archive,
    pack_stream,
)

ROOM = 1 << 30  # bytes that a reader may take beside what the tests hold
SECONDS = 60


def answer(action, *args) -> str:
    "What an action comes to in a process of its own: 'read', its `Problem`, or another end."
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
        try:
            action(*args)
            said = "read"
        except Problem as e:
            said = str(e)
        except BaseException as e:
            said = f"not a problem: {type(e).__name__}: {e}"
        os.write(into, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return said if os.WIFEXITED(status) else f"ended by signal {os.WTERMSIG(status)}"


# Pickles

READERS = {
    "predictions, stream": (pack_stream, Predictions),
    "predictions, zip": (pack_archive, Predictions),
    "weights, stream": (pack_stream, read_pickle),
    "weights, zip": (pack_archive, read_pickle),
    "sentences": (bytes, read_plain_pickle),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_bounded(reader, case, tmp_path):
    pack, read = READERS[reader]
    contents, words = PICKLES[case]
    (tmp_path / "x.pth").write_bytes(pack(contents))
    said = answer(read, tmp_path / "x.pth")
    if reader == "sentences" and case == "a function that calls itself":
        words = "asks for torch._utils"
    if reader.startswith("weights") and case == "a function that calls itself":
        words = "a state of a Maker|damaged"
    assert said.startswith(f"{tmp_path}/x.pth: found"), said
    assert any(w in said for w in words.split("|")), said


def test_a_checkpoint_is_bounded(tmp_path):
    path = tmp_path / "x.pth"
    tensor = torch.zeros(1)
    torch.save({"w": tensor.expand(1 << 16, 1 << 16)}, path)
    assert "a tensor of 4294967296 numbers" in answer(read_pickle, path)
    torch.save({"w": tensor.expand(64, 64)}, path)
    assert answer(read_pickle, path) == "read"
    huge = b"\x80\x02}U\1w(U\7storagectorch\nFloatStorage\nU\0010U\3cpuJ\0\0\0\x7fNtQs."
    path.write_bytes(pack_stream(huge))
    assert "more numbers than the file has bytes" in answer(read_pickle, path)
    loop = b"\x80\x02cargparse\nNamespace\nq\0)\x81q\1}U\1ah\1sb."
    path.write_bytes(pack_archive(loop))
    assert "holds itself" in answer(read_pickle, path)


@pytest.mark.parametrize("read", [Predictions, read_pickle])
def test_an_archive_is_bounded(read, tmp_path):
    path = tmp_path / "x.pth"

    def refused(words):
        said = answer(read, path)
        assert said.startswith(f"{path}: found") and words in said, said

    path.write_bytes(pack_archive(bytes(MOST_STRUCTURE + 1), packed=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 17
    refused(f"{MOST_STRUCTURE + 1} bytes of structure")
    path.write_bytes(pack_archive(b"\x80\x02}.", packed=zipfile.ZIP_DEFLATED))
    refused("is packed, which PyTorch never does")
    path.write_bytes(pack_archive(b"\x80\x02}.", names=("a/data.pkl", "b/data.pkl")))
    refused("2 data.pkl")
    with pytest.warns(UserWarning, match="Duplicate"):
        path.write_bytes(pack_archive(b"\x80\x02}.", names=("a/data.pkl", "a/data.pkl")))
    refused("two members of one name")
    path.write_bytes(pack_archive(b"\x80\x02}."))
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 12 : end + 16] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    refused("a list of members of 1073741824 bytes")


def test_published_files_read_as_before(tmp_path):
    state = OrderedDict(w=torch.arange(6.0).view(2, 3), b=torch.ones(2).half())
    state._metadata = OrderedDict([("", {"version": 1})])
    file = {"model": state, "epoch": 3, "best": np.float64(0.5), "names": {"a", "b"}, 7: (1, [2])}
    for archive in (True, False):
        torch.save(file, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
        found = read_pickle(tmp_path / "x.pth")
        assert torch.equal(found["model"]["w"], state["w"]) and found[7] == (1, [2])
        assert (found["epoch"], found["best"], found["names"]) == (3, 0.5, {"a", "b"})
    plain = [{"sent": "wer ist das\u00e9", "ids": [1, 2.5, None, True]}]
    for protocol in range(5):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(plain, protocol))
        assert read_plain_pickle(tmp_path / "refs.p") == plain
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'sent'\nS'caf\\xc3\\xa9'\nsa.")  # Python 2
    assert read_plain_pickle(tmp_path / "refs.p") == [{"sent": "café"}]


# Arrays


def write_h5(path, fill):
    with h5py.File(path, "w") as f:
        f["instance"] = np.ones((1, 1))
        fill(f)


def link_external(f):
    with h5py.File(f.filename + ".other", "w") as other:
        other["reMask"] = np.ones((4, 4), np.uint8)
    f["reMask"] = h5py.ExternalLink(f.filename + ".other", "/reMask")


def link_loop(f):
    f["reMask"], f["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/reMask")


def store_outside(f):
    f.create_dataset("reMask", (4, 4), "u1", external=[("/etc/hostname", 0, 16)])


def compose_virtually(f):
    layout = h5py.VirtualLayout((4, 4), "u1")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "reMask", (4, 4))
    f.create_virtual_dataset("reMask", layout)


def declare_gigabytes(f):
    f.create_dataset("reMask", (1 << 16, 1 << 16), "u1", chunks=(64, 64), compression="gzip")


def pack_gigabytes(f):
    array = f.create_dataset("reMask", (64, 64), "u1", chunks=(64, 64), compression="gzip")
    array.id.write_direct_chunk((0, 0), zlib.compress(bytes(4096 + 600)))


def pack_strangely(f):
    f.create_dataset("reMask", data=np.ones((64, 64), np.uint8), compression="lzf")


def hold_texts(f):
    f["reMask"] = ["a", "b"]


def hold_a_group(f):
    f.create_group("reMask")


H5 = {
    link_external: "a link to somewhere else",
    link_loop: "a link to somewhere else",
    store_outside: "lie in other files",
    compose_virtually: "lie in other files",
    declare_gigabytes: "an array of 4294967296 bytes",
    pack_gigabytes: "unpacks to more than its shape",
    pack_strangely: "packed by the filters",
    hold_texts: "no array of numbers",
    hold_a_group: "no array of numbers",
}


@pytest.mark.parametrize("fill", H5, ids=lambda f: f.__name__)
def test_hdf5_is_bounded_and_stays_in_its_file(fill, tmp_path):
    write_h5(tmp_path / "x.h5", fill)
    said = answer(read_h5_masks, tmp_path / "x.h5")
    assert said.startswith(f"{tmp_path}/x.h5: found") and H5[fill] in said, said


def test_hdf5_as_published_is_read(tmp_path):
    mask = np.eye(64, 48, dtype=np.uint8)
    for options in ({}, {"compression": "gzip", "shuffle": True, "fletcher32": True}):
        write_h5(tmp_path / "x.h5", lambda f, o=options: f.create_dataset("reMask", data=mask, **o))
        instances, masks = read_h5_masks(tmp_path / "x.h5")
        assert instances == [1] and (masks[0] == mask.T).all()
        (tmp_path / "x.h5").unlink()


def write_mat(path, element: bytes):
    savemat(path, {"part_mask": np.ones((2, 2), np.uint8)})
    path.write_bytes(path.read_bytes()[:128] + element)


def matrix(shape, kind=9, stored=b"\1\1\1\1", length=None) -> bytes:
    "An array of a MATLAB file whose shape and length may say anything."
    dims = struct.pack(f"<{len(shape)}i", *shape) + bytes(4 * (len(shape) % 2))
    length = len(stored) if length is None else length
    body = struct.pack("<IIII", 6, 8, kind, 0) + struct.pack("<II", 5, 4 * len(shape)) + dims
    body += struct.pack("<II", 1, 9) + b"part_mask" + bytes(7)
    body += struct.pack("<II", 2, length) + stored
    return struct.pack("<II", 14, len(body)) + body


def pack_element(element: bytes) -> bytes:
    packed = zlib.compress(element)
    return struct.pack("<II", 15, len(packed)) + packed


MATS = {
    "a bomb": (pack_element(bytes(300 << 20)), "unpacks to more than"),
    "a shape of gigabytes": (pack_element(matrix((1 << 16, 1 << 16))), "bytes, more than"),
    "a length of gigabytes": (
        pack_element(matrix((2, 2), length=0x7FFFFFF0)),
        "an element of 2147483632 bytes",
    ),
    "half of it": (matrix((2, 2))[:40], "ends in the middle"),
}


@pytest.mark.parametrize("case", MATS)
def test_a_matlab_file_is_bounded(case, tmp_path):
    element, words = MATS[case]
    write_mat(tmp_path / "x.mat", element)
    said = answer(read_mat_masks, tmp_path / "x.mat")
    assert said.startswith(f"{tmp_path}/x.mat: found") and words in said, said


def test_a_matlab_file_holds_numbers(tmp_path):
    write_mat(tmp_path / "x.mat", pack_element(matrix((2, 2))))
    assert answer(read_mat_masks, tmp_path / "x.mat") == "read"
    savemat(tmp_path / "c.mat", {"part_mask": np.array([[1, "a"]], object)})
    assert "part_mask is a cell" in answer(read_mat_masks, tmp_path / "c.mat")


# Pictures


PALETTE = make_chunk(b"PLTE", bytes([0, 0, 0, 128, 0, 0]))
PIXELS = {"grey": (8, 0, 1), "grey 16": (16, 0, 2), "RGB": (8, 2, 3), "palette": (8, 3, 1)}


@pytest.mark.parametrize("kind", PIXELS)
def test_a_half_png_is_refused(kind, tmp_path):
    bits, colour, size = PIXELS[kind]
    row = b"\0" + 32 * size * (b"\1" if kind == "palette" else b"\xff")
    extra = PALETTE if kind == "palette" else b""
    readers = [read_frame, read_mask, read_labels][: 2 if kind == "RGB" else 3]
    path = tmp_path / "x.png"
    for count, words in ((16, "read"), (15, "its rows end"), (8, "its rows end"), (0, "")):
        path.write_bytes(make_png((32, 16), count * row, bits, colour, extra))
        for read in readers:
            said = answer(read, path)
            assert words in said and not said.startswith("not a"), (read, said)
    path.write_bytes(make_png((32, 16), 16 * row + row[:7], bits, colour, extra))
    assert answer(read_mask, path) == "read"


def test_a_half_interlaced_png_is_refused(tmp_path):
    passes = [(2, 4), (2, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 32)]  # rows, columns
    rows = [h * (b"\0" + w * 3 * b"\xff") for h, w in passes]
    for count, words in ((7, "read"), (6, "its rows end")):
        data = make_png((32, 16), b"".join(rows[:count]), colour=2, interlaced=1)
        (tmp_path / "x.png").write_bytes(data)
        assert words in answer(read_frame, tmp_path / "x.png")


@pytest.mark.parametrize("read", [read_frame, read_mask, read_labels, read_picture_size])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_gigabytes_is_refused(read, tmp_path):
    for size, words in ((65_000, "exceeds limit"), (10_000, f"more than {MOST_PIXELS}")):
        (tmp_path / "x.png").write_bytes(make_png((size, size), bytes(1000)))
        said = answer(read, tmp_path / "x.png")
        assert said.startswith(f"{tmp_path}/x.png: found a picture") and words in said, said


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_mask_of_gigabytes_in_results_is_refused():
    data = make_png((65_000, 65_000), bytes(1000))
    assert "exceeds limit" in answer(decode_mask, data, "x.png")
    assert "as the frames have" in answer(decode_mask, data, "x.png", (64, 96))


def test_a_picture_runs_no_other_program(tmp_path):
    "PostScript would be given to Ghostscript."
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    for read in (read_frame, read_mask, read_picture_size):
        assert "cannot identify" in answer(read, tmp_path / "x.png")


@pytest.mark.parametrize("hostile", list_hostile(), ids=lambda h: f"{h.kind}, {h.name}")
def test_the_self_test_of_a_machine(hostile, tmp_path):
    "In this process, as `rvos doctor --self-test` does it."
    assert not offer_file(hostile, tmp_path)


# Archives of results, lists of films, links


def test_a_zip_of_results_is_bounded(tmp_path):
    path = tmp_path / "x.zip"

    def refused(words, kind=stat.S_IFREG, data=b"", packed=zipfile.ZIP_STORED):
        info = zipfile.ZipInfo("v/0/00000.png")
        info.external_attr, info.compress_type = (kind | 0o644) << 16, packed
        with zipfile.ZipFile(path, "w") as box:
            box.writestr(info, data)
        said = answer(open_results, path)
        assert said.startswith(f"{path}, member") and words in said, said

    refused("a link or a special file", stat.S_IFLNK, b"/etc/passwd")
    refused("a link or a special file", stat.S_IFIFO)
    refused("at most 200 times", data=bytes(1 << 25), packed=zipfile.ZIP_DEFLATED)
    refused("67108865 bytes unpacked", data=bytes((1 << 26) + 1), packed=zipfile.ZIP_DEFLATED)


LISTS = {
    "m3u8": "#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "mpd": "<?xml version='1.0'?>\n<MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'>"
    "<Period><BaseURL>{}</BaseURL></Period></MPD>\n",
}


@pytest.mark.parametrize("suffix", ["as it is", ".mp4"])
@pytest.mark.parametrize("form", LISTS)
def test_a_list_of_films_is_no_film(form, suffix, tmp_path):
    film = Path(__file__).with_name("trials") / "phone.mp4"
    path = tmp_path / f"x{'.' + form if suffix == 'as it is' else suffix}"
    path.write_text(LISTS[form].format(film))
    said = answer(open_clip, path)
    assert said.startswith(f"{path}: found a file that"), said
    assert "names other files" in said or "cannot be decoded" in said, said


def test_links_that_go_round(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "00000.png")
    (tmp_path / "00001.png").symlink_to("00002.png")
    (tmp_path / "00002.png").symlink_to("00001.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [*find_files(tmp_path, (".png",))] == ["00000"]
    assert open_clip(tmp_path).frames == ("00000",)
    with open_results(tmp_path) as results, pytest.raises(Problem, match=r"00001\.png"):
        results.mask("00001.png")
    with pytest.raises(Problem, match=r"00001\.png"):
        read_frame(tmp_path / "00001.png")


# A full disk, and the network


def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
    def full(name):
        return pytest.raises(Problem, match=rf"{name}: found no space left on the device")

    (tmp_path / ".owner").symlink_to("/dev/full")
    with full(".owner"), locked(tmp_path):
        raise AssertionError("locked")
    with locked(tmp_path):
        assert (tmp_path / ".owner").read_text().startswith("pid ")

    def acquire(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rvos_nb.stage.FileLock.acquire", acquire)
    with full(".lock"), locked(tmp_path / "other"):
        raise AssertionError("locked")


COUNT_SOCKETS = """
import json, socket, sys
import rvos_nb
tried = []

def refuse(what):
    def call(*args, **_):
        host = args[0] if what == "getaddrinfo" else args[1]
        if isinstance(host, (str, bytes)) and what == "connect":
            return connect(*args)  # a socket of this machine
        tried.append(f"{what} {host}")
        raise OSError("no network in this test")
    return call

connect = socket.socket.connect
socket.getaddrinfo = refuse("getaddrinfo")
socket.socket.connect = refuse("connect")
socket.socket.connect_ex = refuse("connect")

from rvos_nb.cli import main

ends = []
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
        ends.append(0)
    except SystemExit as e:
        ends.append(e.code or 0)
counted = len(tried)
from huggingface_hub import HfApi
try:
    HfApi().model_info("user/model")
except Exception:
    pass
print(json.dumps([ends, tried[:counted], len(tried) > counted]))
"""


def test_nothing_is_sent_without_online(tmp_path):
    "Not by the commands, and not by the libraries on their own; the last request shows it counts."
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(frames / "00000.png")
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(64, 96, dtype=np.uint8) * 255).save(mask)
    sam = "facebook/sam2.1-hiera-tiny"

    def predict(model):
        return ["predict", str(frames), "it", "--model", model, "--out", str(tmp_path / model)]

    def propagate(model):
        out = str(tmp_path / "p" / model)
        options = ["--mask", str(mask), "--model", model, "--out", out]
        return ["propagate", str(frames), *options]

    commands = [["models"], predict("referformer-tiny"), predict("user/model"), predict(sam)]
    commands += [propagate("aot-tiny"), propagate(sam), propagate("user/model")]
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    env |= {"HF_HOME": str(tmp_path / "hub"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_SOCKETS, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    ends, tried, counts = json.loads(done.stdout.splitlines()[-1])
    assert (tried, counts) == ([], True), done.stderr
    assert ends == [0, 0, 1, 1, 0, 1, 1], done.stderr
    assert "no weights here" in done.stderr


def test_the_switch_is_put_back(monkeypatch):
    from huggingface_hub import constants

    for before in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)
        with keep_offline(online=True):
            assert before == constants.HF_HUB_OFFLINE
        with keep_offline():
            assert constants.HF_HUB_OFFLINE
        assert before == constants.HF_HUB_OFFLINE


# Formats of our own

RECORD = {
    "stage": "predict",
    "params": {"split": "valid"},
    "inputs": {"a": "0123456789abcdef"},
    "parts": {"a": {"v/0": "0123456789abcdef"}},
    "contents": "0123456789abcdef",
    "units": {"v/0": "done", "v/1": "failed", "v/2": "to do"},
    "failures": {"v/1": "a reason"},
    "sources": {"v/0": ["0123456789abcdef", "0123456789abcdef"]},
}
KEYS = {"v": {"0": {"index_info": {"class_index": 3}}}}
WORK = {
    "asked": {"does": "fuse", "makes": ["swap"], "parameters": {"mode": "vote"}},
    "state": "done",
    "inputs": {
        "a": {
            "fingerprint": "0123456789abcdef",
            "extent": [3, "0123456789abcdef", "0123456789abcdef", "0123456789abcdef"],
            "masks": "0123456789abcdef",
        }
    },
    "data": {"listing": "0123456789abcdef", "all": "0123456789abcdef"},
    "looks": {"swap": [3, "0123456789abcdef", "0123456789abcdef", "0123456789abcdef"]},
}
FORMATS = {
    "run.json": (RECORD, read_record),
    "key_frame.json": (KEYS, read_key_frames),
    "STAGE.json": (WORK, read_work_record),
}
DAMAGE = {
    "0 bytes": b"",
    "half a file": b'{"stage": "predict", "par',
    "no JSON": b"stage: predict",
    "no UTF-8": b'{"stage": "\xff\xfe"}',
    "a list": b"[]",
    "a text": b'"run"',
    "a number": b"3",
    "null": b"null",
    "NaN": b"NaN",
    "a thousand brackets": 1000 * b"[" + 1000 * b"]",
    "a hundred thousand brackets": 100_000 * b"[",
    "many digits": b'{"stage": ' + 5000 * b"9" + b"}",
    "deep parameters": b'{"stage": "x", "params": ' + 90 * b'{"a":' + b"1" + 91 * b"}",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", DAMAGE)
def test_a_record_that_is_damaged(name, case, tmp_path):
    _, read = FORMATS[name]
    (tmp_path / name).write_bytes(DAMAGE[case])
    with pytest.raises(Problem) as e:
        read(tmp_path / name)
    assert str(e.value).startswith(f"{tmp_path / name}") and len(str(e.value)) < 700


def list_places(value, place=()):
    "The places of all values inside of a JSON."
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inside:
        yield (*place, key)
        if isinstance(part, (dict, list)):
            yield from list_places(part, (*place, key))


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_of_another_kind_is_named(name, tmp_path):
    "Every value of every record, in turn replaced by one of every other kind."
    whole, read = FORMATS[name]
    path = tmp_path / name
    for place in list_places(whole):
        for odd in (None, [], {}, 3, "x", 1.5, True, float("nan"), -1, 10**40, [None], {"a": 1}):
            spoiled = json.loads(json.dumps(whole))
            holder = spoiled
            for part in place[:-1]:
                holder = holder[part]
            before = holder[place[-1]]
            holder[place[-1]] = odd
            path.write_text(json.dumps(spoiled))
            if place[:1] == ("params",) or place[:2] == ("asked", "parameters"):
                same = isinstance(odd, dict) or len(place) > (1 if place[0] == "params" else 2)
            else:
                same = type(odd) is type(before) and (odd != -1 or name != "key_frame.json")
            try:
                read(path)
            except Problem as e:
                assert str(e).startswith(f"{path}, {place[0]}"), (place, odd, e)
            else:
                assert same, f"{odd!r} was taken at {place}"


@pytest.mark.parametrize(
    "name, place, new, words",
    [
        ("run.json", "stage", "stgae", "stage: found nothing (is it meant by 'stgae'?)"),
        ("STAGE.json", "state", "sate", "state: found nothing (is it meant by 'sate'?)"),
    ],
)
def test_a_misspelt_field_is_told_its_name(name, place, new, words, tmp_path):
    whole, read = FORMATS[name]
    record = {new if k == place else k: v for k, v in whole.items()}
    (tmp_path / name).write_text(json.dumps(record))
    with pytest.raises(Problem) as e:
        read(tmp_path / name)
    assert words in str(e.value)


def test_a_work_record_of_before_counts_as_none(tmp_path):
    "The state of the data was not in it."
    before = {k: v for k, v in WORK.items() if k != "data"}
    (tmp_path / "fuse.json").write_text(json.dumps(before))
    assert read_work_record(tmp_path / "fuse.json") == {}


def test_a_misspelt_state_is_told_its_name(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RECORD | {"units": {"v": "don"}}))
    with pytest.raises(Problem, match=r"units, v: found 'don' \(did you mean 'done'\?\)"):
        read_record(tmp_path / "run.json")


@dataclass
class WriteWord(StageWork):
    stage = "word"

    def results(self, unit):
        return [self.out / f"{unit}.txt"]

    def sources(self, unit):
        return Sources(unit)

    def do(self, unit, prepared=None):
        self.results(unit)[0].write_text("word")


@pytest.mark.parametrize(
    "line",
    [b"3", b"[]", b'["a"]', b'["a", 3]', b'["a", [3, 4]]', b'[["a"], ["x", "y"]]', b"\xff", b"{"],
)
def test_a_line_of_sources_that_is_none(line, tmp_path):
    (tmp_path / "a.txt").write_text("word")
    (tmp_path / ".sources").write_bytes(line + b"\n")
    assert run_stage(WriteWord(tmp_path, {}, ["a", "b"])).done == ["b"]
    assert list(read_record(tmp_path / "run.json")["sources"]) == ["a", "b"]


def test_a_damaged_record_stops_its_stage_and_nothing_goes(tmp_path):
    (tmp_path / "a.txt").write_text("word")
    (tmp_path / "run.json").write_text("[]")
    for force in (False, True):
        with pytest.raises(Problem, match=r"run\.json: found \[\]"):
            run_stage(WriteWord(tmp_path, {}, ["a"]), Execution(force=force))
    assert (tmp_path / "a.txt").exists()
