"Small trees in the layouts of the benchmarks, made out of RefShapes."

import json
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from rvos_nb.cluster import list_users
from rvos_nb.data.refshapes import write
from rvos_nb.vos.propagator import Propagator

SIZE = (64, 96)
ODD = [
    None,
    3,
    -1,
    "",
    [],
    {},
    "../x",
    [None],
    {"a": 1},
    1.5,
    True,
    "9" * 5000,
    "\ud800",
    [[[[]]]],
]  # what a value of a broken list may be


def spoil(listing, rng, share: float = 0.3):
    """Put something odd in the place of one value of a JSON, in place;
    of a list or object with the probability `share`."""
    while True:
        keys = list(listing) if isinstance(listing, dict) else list(range(len(listing)))
        if not keys:
            return
        key = keys[rng.integers(len(keys))]
        if not isinstance(listing[key], (dict, list)) or rng.random() < share:
            listing[key] = ODD[rng.integers(len(ODD))]
            return
        listing = listing[key]


def make(root: Path, layout: str, split: str, videos: int = 2, frames: int = 5) -> Path:
    "A tree of easy scenes; its folder."
    write(root, split, "easy", videos, seed=50, frames=frames, size=SIZE, layout=layout)
    return root


def write_davis(root: Path, annotators: int = 4) -> Path:
    """Ref-DAVIS17 in its converted form, with the first `annotators` sentences of each object:
    sentence annotators · object + annotator."""
    path = make(root, "ref-davis17", "valid") / "meta_expressions/valid/meta_expressions.json"
    listing = json.loads(path.read_text())
    for v in listing["videos"].values():
        kept = [e for k, e in v["expressions"].items() if int(k) % 4 < annotators]
        v["expressions"] = {str(k): e for k, e in enumerate(kept)}
    path.write_text(json.dumps(listing))
    return root


write_a2d = partial(make, layout="a2d-sentences", split="test", frames=6)
write_jhmdb = partial(make, layout="jhmdb-sentences", split="test")
write_refcoco = partial(make, layout="refcoco", split="refcoco+_val", videos=3, frames=1)

TREES = {
    "ref-davis17": write_davis,
    "a2d-sentences": write_a2d,
    "jhmdb-sentences": write_jhmdb,
    "refcoco": write_refcoco,
}


def record_validation(trainer, batch, monkeypatch):
    "The queries (E, T) and masks (E, T, Q, h, w) that the validation of one batch scores."
    from rvos_nb.train.refer import clip_scores

    scored = []

    def record(query, masks, batch):
        scored.append((query, masks))
        return clip_scores(query, masks, batch)

    monkeypatch.setattr("rvos_nb.train.refer.clip_scores", record)
    trainer.validate([("easy", batch)])
    (answer,) = scored
    return answer


# a narrow query model of ReferFormer's shape, for trainings of a few steps
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
NARROW = {
    "backbone": "conv_tiny",
    "num_feature_levels": 3,
    "enc_layers": 1,
    "dec_layers": 2,
    "hidden_dim": 16,
    "dim_feedforward": 16,
    "nheads": 2,
    "enc_n_points": 1,
    "dec_n_points": 1,
    "fusion_heads": 2,
    "proj_groups": 2,
    "short_side": 32,
    "text": TEXT,
}


class Still(Propagator):
    "Believes that nothing moves."

    def fork(self, scale=None):
        return Still()

    def start(self, size):
        self.labels = None

    def remember(self, frame, labels):
        self.labels = torch.as_tensor(labels).long()

    def step(self, frame):
        count = int(self.labels.max()) + 1
        return torch.nn.functional.one_hot(self.labels, max(2, count)).permute(2, 0, 1).float()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    "Whether a process is there, and no zombie that nobody has buried."
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


MARK = "RVOS_TEST_MARK"  # in the environment of processes that a test starts: a folder of theirs


def list_marked(place) -> set[int]:
    "Processes, zombies aside, that have this mark in their environment, or files in the folder."
    found = set(list_users(place))
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={place}".encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found
