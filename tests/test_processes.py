"Stages on worker processes: models travel to the workers, and the results are the same bytes."

import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest

from rvos_nb.commands.app import read_numbers
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.fuse import Rule
from rvos_nb.keyframe import choose_key_frames
from rvos_nb.pool import ProcessPool, hand_out
from rvos_nb.predict import predict
from rvos_nb.propagate import propagate
from rvos_nb.propagation import Propagation
from rvos_nb.units import map_units


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_models_are_sent_to_processes(tmp_path):
    data = tmp_path / "data"
    refshapes.write(data, "valid", "easy", videos=2, seed=4, frames=3, size=(64, 96))
    for executor in ("local", "processes:2"):
        run = tmp_path / executor.split(":")[0]
        predict(data, run / "masks", executor=executor).check()
        choose_key_frames(run / "masks")
        propagate(data, run / "masks", run / "aot", executor=executor).check()
    assert len(files(tmp_path / "local")) > 20
    assert files(tmp_path / "local") == files(tmp_path / "processes")


def test_work_that_cannot_be_sent_is_named():
    with pytest.raises(Problem, match="cannot be sent"):
        list(map_units(lambda unit: None, ["a"], "processes:2"))


def test_numbers_that_are_none():
    for texts in ([""], [","], ["a"]):
        with pytest.raises(Problem, match="--weights"):
            read_numbers("weights", texts)
    with pytest.raises(Problem, match="weights"):
        Rule(weights=(float("inf"), 1))
    for scale in ("nan", "inf"):
        with pytest.raises(Problem, match="scales"):
            Propagation(scales=(float(scale),))


class Mortal:
    "Ends its worker on the first trial of 'once', and on every trial of 'killer'."

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, unit):
        trials = len(list(self.folder.glob(f"{unit}-*")))
        (self.folder / f"{unit}-{trials}").touch()
        if unit == "killer" or (unit == "once" and not trials):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_unit_is_tried_once_more(tmp_path):
    import test_processes

    work = test_processes.Mortal(tmp_path)
    ends = dict(map_units(work, ["a", "once", "killer", "b"], "processes:2"))
    assert [ends[unit] for unit in ("a", "once", "b")] == [None] * 3
    assert "died 2 times (the last one ended with exit code -9)" in str(ends["killer"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-0",
        "b-0",
        "killer-0",
        "killer-1",
        "once-0",
        "once-1",
    ]


class StillbornProcess:
    "A process that dies before it reads what it is sent."

    pid, exitcode = 1, 1

    def __init__(self, target, args, daemon):
        (self.pipe,) = args

    def start(self):
        self.pipe.close()

    def join(self):
        pass

    def terminate(self):
        pass


def test_a_worker_that_dies_at_once_costs_its_unit_only():
    pool = ProcessPool(b"work", 1)
    pool.context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=StillbornProcess)
    ends = [end for _, end in hand_out(pool, ["a", "b"])]
    assert sorted(end.unit for end in ends) == ["a", "b"]
    for end in ends:
        assert "died 2 times" in str(end.error)
