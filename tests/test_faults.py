"""Faults: after each of them the same call ends in the bytes of an undisturbed run, nothing half
is left. RVOS_MOMENTS=20 tries so many moments of every stage."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import MARK, list_marked, wait_until

from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.evaluate import evaluate
from rvos_nb.files import write_json
from rvos_nb.fuse import fuse
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.label_maps import merge_annotators
from rvos_nb.pipeline import run_stage_here, run_workflow
from rvos_nb.predict import predict
from rvos_nb.propagate import propagate
from rvos_nb.stage import Report, StageFailed
from rvos_nb.study import study
from rvos_nb.submit import submission

MOMENTS = int(os.environ.get("RVOS_MOMENTS", "2"))
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, signals, mounts"),
    pytest.mark.timeout(120 + 120 * MOMENTS),
]
FORKS = multiprocessing.get_context("forkserver")

# Every stage reads `data` and the runs `a` and `b`; all but `keyframe` write `out`.
STAGES = {
    "predict": lambda root: predict(root / "data", root / "out"),
    "keyframe": lambda root: choose_key_frames(root / "b"),
    "propagate": lambda root: propagate(root / "data", root / "a", root / "out"),
    "fuse": lambda root: fuse(root / "data", [root / "a", root / "b"], root / "out"),
    "merge": lambda root: merge_annotators(open_dataset(root / "data"), root / "a", root / "out"),
    "search": lambda root: study(root / "data", [root / "a", root / "b"], root / "out", folds=2),
    "evaluate": lambda root: evaluate(root / "data", root / "a", root / "out"),
    "submit": lambda root: submission(root / "data", root / "a", root / "out/s.zip"),
}
WITH_UNITS = ("predict", "propagate", "fuse", "merge")


def do_stage(stage: str, root: Path):
    made = STAGES[stage](root)
    if isinstance(made, Report):
        made.check()


def files(folder):
    "What is there, wherever the folder lies."
    paths = [p for p in folder.rglob("*") if p.is_file()]
    place = str(folder).encode()
    return {str(p.relative_to(folder)): p.read_bytes().replace(place, b"") for p in paths}


# A stage in a process of its own, and a fault before one of the changes that it makes to files.

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime")


def changes_files(event: str, arguments: tuple, root: Path) -> bool:
    if event != "open":
        return event in CHANGES
    path, _, flags = arguments
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    return bool(writes) and str(path).startswith(str(root))


def meet_fault(stage: str, root: Path, fault, moment: int):
    "Body of the process. Writes how often it changed files, and what it raised."
    count, told = 0, ""

    def look(event, arguments):
        nonlocal count
        if changes_files(event, arguments, root):
            count += 1
            if count == moment:
                fault(root)

    sys.addaudithook(look)
    try:
        do_stage(stage, root)
    except (Problem, StageFailed) as e:
        told = str(e)
    root.with_suffix(".told").write_text(f"{count}\n{told}")


def do_nothing(root: Path):
    pass


def die(root: Path):
    os.kill(os.getpid(), signal.SIGKILL)


def pause(root: Path):
    os.kill(os.getpid(), signal.SIGSTOP)


def lose_output(root: Path):
    shutil.rmtree(root / "out", ignore_errors=True)


def start(stage: str, root: Path, fault=do_nothing, moment: int = 0):
    process = FORKS.Process(target=meet_fault, args=(stage, root, fault, moment))
    process.start()
    return process


def read_told(root: Path) -> tuple[int, str]:
    "How often the process changed files; what it raised, '' for nothing."
    count, told = root.with_suffix(".told").read_text().split("\n", 1)
    return int(count), told


# What is left when nothing happens


@dataclass
class Undisturbed:
    files: dict[str, bytes]
    changes: int  # of files
    seconds: float


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "What the stages read."
    root = tmp_path_factory.mktemp("made") / "root"
    refshapes.write(root / "data", "valid", "easy", videos=3, seed=5, frames=3, size=(48, 72))
    predict(root / "data", root / "a").check()
    shutil.copytree(root / "a", root / "b")
    choose_key_frames(root / "a")
    packages = ("rvos_nb.", "transformers.", "pytest")  # what processes would import, each anew
    FORKS.set_forkserver_preload([name for name in sys.modules if name.startswith(packages)])
    return root


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    "Called with the name of a stage."
    known = {}

    def look_up(stage) -> Undisturbed:
        if stage not in known:
            root = tmp_path_factory.mktemp("whole") / "root"
            shutil.copytree(made, root)
            start(stage, root).join()  # the first has more to import
            shutil.rmtree(root)
            shutil.copytree(made, root)
            begun = time.monotonic()
            start(stage, root).join()
            seconds = time.monotonic() - begun
            count, told = read_told(root)
            assert not told and count > 3
            known[stage] = Undisturbed(files(root), count, seconds)
        return known[stage]

    return look_up


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "root"))


def renew(root: Path, made: Path):
    shutil.rmtree(root)
    shutil.copytree(made, root)


def run_again(stage: str, root: Path, whole: Undisturbed):
    "The same call, in this process, ends in the same files."
    do_stage(stage, root)
    found = files(root)
    assert found.keys() == whole.files.keys()
    other = [name for name in found if found[name] != whole.files[name]]
    assert not other, (other, found[other[0]], whole.files[other[0]])


def choose_moments(stage: str, most: int) -> list[int]:
    return random.Random(stage).sample(range(1, most + 1), min(MOMENTS, most))


# kill -9


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_any_change_of_files(stage, made, undisturbed, root):
    whole = undisturbed(stage)
    for moment in choose_moments(stage, whole.changes):
        renew(root, made)
        killed = start(stage, root, die, moment)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        run_again(stage, root, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_time(stage, made, undisturbed, root):
    whole = undisturbed(stage)
    for thousandth in choose_moments(stage, 1000):
        renew(root, made)
        killed = start(stage, root)
        killed.join(whole.seconds * thousandth / 1000)
        killed.kill()
        killed.join()
        run_again(stage, root, whole)


# Disks


@pytest.fixture
def disk(tmp_path):
    "A disk of its own."
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "rvos", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(place: Path, options: str):
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def measure_used(place: Path) -> int:  # bytes
    about = os.statvfs(place)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def count_pages(held: dict[str, bytes]) -> int:
    return sum(-(-len(data) // 4096) for data in held.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(stage, made, undisturbed, disk):
    whole, root = undisturbed(stage), disk / "root"
    needed = count_pages(whole.files) - count_pages(files(made))
    for pages in choose_moments(stage, needed - 1):
        shutil.copytree(made, root)
        remount(disk, f"size={measure_used(disk) + 4096 * pages}")
        with pytest.raises((Problem, StageFailed), match="no space left"):
            do_stage(stage, root)
        assert not list(root.rglob(".tmp-*"))
        remount(disk, "size=100m")
        run_again(stage, root, whole)
        shutil.rmtree(root)


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_cannot_be_written(stage, made, undisturbed, disk):
    root = Path(shutil.copytree(made, disk / "root"))
    remount(disk, "ro")
    with pytest.raises(Problem, match="no permission to write"):
        do_stage(stage, root)
    assert files(root) == files(made)
    remount(disk, "rw")
    run_again(stage, root, undisturbed(stage))


# Others


@pytest.mark.parametrize("stage", STAGES)
def test_the_second_of_two_runs_refuses(stage, undisturbed, root):
    whole = undisturbed(stage)
    first = start(stage, root, pause, whole.changes // 2)
    state = Path(f"/proc/{first.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    before = files(root)
    with pytest.raises(Problem, match=rf"another run at work there \(pid {first.pid} on "):
        do_stage(stage, root)
    assert files(root) == before
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert read_told(root)[1] == "" and files(root) == whole.files


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "keyframe"])
def test_a_folder_that_vanishes_is_named(stage, made, undisturbed, root):
    whole = undisturbed(stage)
    for moment in choose_moments(stage, whole.changes):
        renew(root, made)
        ended = start(stage, root, lose_output, moment)
        ended.join()
        assert ended.exitcode == 0, "another error than those of a stage"
        told = read_told(root)[1]
        assert "removed or taken over while" in told or files(root) == whole.files, told
        run_again(stage, root, whole)


def make_older(folder: Path):
    "As if a clock that was a day ahead had made it, and was set back since."
    for path in folder.rglob("*"):
        moment = path.stat().st_mtime_ns + 86400 * 10**9
        os.utime(path, ns=(moment, moment))


@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_was_set_back(stage, undisturbed, root):
    whole = undisturbed(stage)
    start(stage, root, die, whole.changes * 2 // 3).join()
    make_older(root)
    run_again(stage, root, whole)


@pytest.mark.parametrize("stage", ["predict", "propagate"])
def test_a_frame_that_changed_after_the_clock_was_set_back(stage, root):
    do_stage(stage, root)
    make_older(root)
    frame = min((root / "data").rglob("*.jpg"))
    held = frame.read_bytes()
    frame.write_bytes(held[:-3] + bytes([held[-3] ^ 1]) + held[-2:])
    again = STAGES[stage](root).again
    assert {unit.split("/")[0] for unit in again} == {frame.parent.name}
    assert not STAGES[stage](root).again


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_in_another_place(stage, undisturbed, root, tmp_path):
    "Its first machine died, and left its lock; the times of files were not copied."
    whole = undisturbed(stage)
    start(stage, root, die, whole.changes // 2).join()
    owners = list(root.rglob(".*owner"))
    assert len(owners) == 1
    owners[0].write_text("pid 1 on a-machine-that-died")
    elsewhere = tmp_path / "elsewhere/root"
    shutil.copytree(root, elsewhere, copy_function=shutil.copyfile)
    shutil.rmtree(root)
    run_again(stage, elsewhere, whole)


# The end of a driver, which has a notebook's kernel and workers

RVOS = Path(sys.executable).parent / "rvos"


def start_rvos(place: Path, *words):
    environment = os.environ | {MARK: str(place)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([RVOS, *map(str, words)], env=environment, text=True, **pipes)


def write_recipe(folder: Path):
    places = {"data_dir": str(folder / "data"), "out_dir": str(folder / "out/look")}
    stage = {"name": "look", "notebook": "predict", "parameters": places}
    stage["parameters"]["executor"] = "processes:2"
    recipe = {"name": "one", "parameters": {"out": str(folder / "out")}, "stages": [stage]}
    write_json(folder / "recipe.yaml", recipe)
    return recipe


def end_by(driver, place: Path, number: int):
    """Kill the driver, or ask all as Slurm does; nobody lives ten seconds later, on a machine that
    has a core for each that is at work."""
    pids = [driver.pid] if number == signal.SIGKILL else list_marked(place)
    for pid in pids:
        os.kill(pid, number)
    said = driver.communicate()[1]
    share = max(1, os.getloadavg()[0] / os.cpu_count())
    wait_until(lambda: not list_marked(place), 10 * share)
    return said


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_recipe_that_is_ended(how, tmp_path):
    refshapes.write(tmp_path / "data", "valid", "easy", videos=24, seed=5, frames=2, size=(48, 72))
    recipe, done = write_recipe(tmp_path), tmp_path / "out/look/Annotations"
    driver = start_rvos(tmp_path, "run", tmp_path / "recipe.yaml")
    wait_until(lambda: (done.exists() and os.listdir(done)) or driver.poll() is not None, 200)
    assert len(list_marked(tmp_path)) >= 5  # it, a stage, a kernel, two workers
    said = end_by(driver, tmp_path, signal.Signals[how])
    if how == "SIGTERM":
        assert driver.returncode == 143
        assert said.splitlines()[-1].startswith("rvos: ended by SIGTERM; what is done is kept")
    assert 0 < len(os.listdir(done)) < 24
    run_workflow(recipe, run_stage=run_stage_here)
    predict(tmp_path / "data", tmp_path / "whole").check()
    assert files(tmp_path / "out/look") == files(tmp_path / "whole")


def test_a_training_that_is_killed_leaves_no_loader(tmp_path):
    words = ("train-toy", "--device", "cpu", "--workers", "1", "-p", "stages.0.steps", "100000")
    driver = start_rvos(tmp_path, "train", *words, "--out", tmp_path / "out")
    wait_until(lambda: len(list_marked(tmp_path)) > 1 or driver.poll() is not None, 200)
    time.sleep(1)
    assert driver.poll() is None
    end_by(driver, tmp_path, signal.SIGKILL)


# What is kept of an exception keeps no worker


def test_workers_end_with_their_stage(made, root, monkeypatch):
    def refuse(*_, **__):
        raise Problem("log", "no space left", "room", "make some")

    monkeypatch.setattr("rvos_nb.events.EventLog.add_unit", refuse)
    with pytest.raises(Problem, match="no space left") as kept:
        predict(root / "data", root / "out", executor="processes:2")
    assert kept.tb and not multiprocessing.active_children()
