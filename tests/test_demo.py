"The whole chain as a stranger meets it: `rvos demo`, on two videos."

import re
import subprocess
import sys
import zipfile

import pytest

STEPS = ("predict", "aot", "deaot", "swap", "en2", "final")
RVOS = [sys.executable, "-c", "from rvos_nb.cli import main; main()"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [
        *RVOS,
        "demo",
        "-p",
        "videos",
        "2",
        "-p",
        "frames",
        "6",
        "-p",
        "data",
        str(folder / "data"),
        "-p",
        "out",
        str(folder / "out"),
    ]

    def run():
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return folder, run, run()


def test_it_ends_with_the_scores(demo):
    folder, _, ran = demo
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = re.fullmatch(
        "J&F " + " ".join(rf"{step}=(\d+\.\d)" for step in STEPS),
        ran.stdout.strip().splitlines()[-1],
    )
    assert last and all(float(x) > 50 for x in last.groups()), ran.stdout
    for made in ("explore/overlays.mp4", "explore/report.html", "submission.zip"):
        assert (folder / "out" / made).stat().st_size > 1000 and str(
            folder / "out" / made
        ) in ran.stdout
    masks = [
        n
        for n in zipfile.ZipFile(folder / "out" / "submission.zip").namelist()
        if n.endswith(".png")
    ]
    assert masks and all(re.fullmatch(r"Annotations/[^/]+/\d+/\d{5}\.png", n) for n in masks)


def test_a_second_run_finds_it_done(demo):
    folder, run, first = demo

    def bytes_of():
        return {p: p.read_bytes() for p in sorted(folder.rglob("Annotations/*/*/*.png"))}

    before, again = bytes_of(), run()
    assert (
        again.returncode == 0
        and again.stdout.strip().splitlines()[-1] == first.stdout.strip().splitlines()[-1]
    )
    assert before and bytes_of() == before
