"""Processes that draw batches: one is killed, or meets a picture that it cannot read."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data.clips import Stream
from rvos_nb.train import loop
from rvos_nb.train.trainer import Trainer, list_checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills processes by signals")
FATAL = 6  # the step that a worker does not live to draw
MARK = "RVOS_TEST_MARK"  # names a file that is there once a worker died


class FatalStream(Stream):
    "The worker that shall draw one of the batches is killed there, once."

    def __getitem__(self, step):
        mark = Path(os.environ[MARK])
        if step == FATAL and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


class UnreadableStream(Stream):
    def __getitem__(self, step):
        if step == FATAL:
            raise Problem("dog.jpg", "half a picture", "a picture", "copy it again")
        return super().__getitem__(step)


def kill_worker(monkeypatch, at):
    "A worker is killed in the middle of a step."
    one_step = Trainer.one_step

    def kill_and_step(self, batches):
        if self.step == at:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(1)  # it dies while the step goes on
        return one_step(self, batches)

    monkeypatch.setattr(Trainer, "one_step", kill_and_step)


def train_by_command(out, capsys):
    "Exit code of `rvos train`, and what it said."
    with pytest.raises(SystemExit) as e:
        main(["train", "train-toy", "--device", "cpu", "--workers", "1", "--out", str(out)])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err


@pytest.mark.parametrize("when", ["while it draws", "during a step"])
def test_a_worker_that_dies_ends_the_run_and_it_goes_on(when, tmp_path, monkeypatch, capsys):
    loop.train("train-toy", tmp_path / "whole", device="cpu").check()
    monkeypatch.setenv(MARK, str(tmp_path / "died"))
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        if when == "during a step":
            kill_worker(m, at=3)
        else:
            m.setattr(loop, "Stream", FatalStream)
        code, said, errors = train_by_command(out, capsys)
    assert code == 1 and "Traceback" not in errors, errors
    assert "training, workers: found a process that draws batches and died" in errors
    assert "fewer --workers" in errors
    (newest,) = list_checkpoints(out)
    reached = torch.load(newest, weights_only=True)["step"]
    assert f"stopped after {reached} of 10 steps" in said
    assert reached == 4 if when == "during a step" else reached <= FATAL
    code, said, errors = train_by_command(out, capsys)
    assert not code and "10 of 10 steps" in said, errors
    weights = [tmp_path / name / "model/model.safetensors" for name in ("whole", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_worker_cannot_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Stream", UnreadableStream)
    (said,) = loop.train("train-toy", tmp_path, device="cpu", workers=1).failed.values()
    assert said.startswith("dog.jpg: found half a picture")
