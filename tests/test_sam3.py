"""SAM 3 behind the referring protocol: exact against transformers' own walk, bounded, and reached
by the stages."""

import warnings

import numpy as np
import pytest
import torch

from rvos_nb.core import Assumption, Problem
from rvos_nb.data import refshapes, scenes
from rvos_nb.models import zoo
from rvos_nb.models.sam3 import (
    SAM3,
    PlainKernels,
    SessionTrimmer,
    load_sam3,
    small_sam3,
    use_plain_kernels,
)
from rvos_nb.predict import load_referring, predict
from rvos_nb.vos.sam2 import SamPropagator, small_tracker

SHOT = scenes.scene(3, "easy", frames=14, size=(64, 96))
PHRASES = ["the red circle", "all squares"]


def walk_theirs(model, processor, frames, phrase):
    "What transformers shows after each frame, and the objects that it takes back."
    session = processor.init_video_session(video=frames)
    processor.add_text_prompt(session, phrase)
    with use_plain_kernels():
        outs = list(model.propagate_in_video_iterator(session))
    return session, outs


@pytest.mark.parametrize("seed", (1, 3, 9))
def test_every_track_is_that_of_transformers(seed):
    model, processor = small_sam3(seed)
    ours = SAM3(model, processor)
    found = ours.refer(ours.see(SHOT.frames), PHRASES)
    for phrase, tracks in zip(PHRASES, found.tracks):
        session, outs = walk_theirs(model, processor, SHOT.frames, phrase)
        gone = session.hotstart_removed_obj_ids
        shown = {
            (k, out.frame_idx): mask[0]
            for out in outs
            for k, mask in out.obj_id_to_mask.items()
            if k not in gone and k not in out.suppressed_obj_ids
        }
        objects = sorted({k for k, _ in shown})
        assert len(tracks.logits) == len(objects)
        for n, k in enumerate(objects):
            for t in range(len(SHOT.frames)):
                if (k, t) in shown:
                    assert torch.equal(tracks.logits[n, t], shown[k, t])
                else:
                    assert (tracks.logits[n, t] == -10).all() and tracks.scores[n, t] == 0


def test_the_mask_of_a_lone_object_is_what_the_processor_draws():
    model, processor = small_sam3(5)
    ours = SAM3(model, processor)
    found = ours.refer(ours.see(SHOT.frames), PHRASES[:1])
    assert len(found.tracks[0].logits) == 1
    session, outs = walk_theirs(model, processor, SHOT.frames, PHRASES[0])
    drawn = found.masks(0)
    for out in outs:
        masks = processor.postprocess_outputs(session, out)["masks"]
        assert torch.equal(drawn[out.frame_idx], masks.any(0))


def test_a_session_does_not_grow_with_the_clip():
    model, processor = small_sam3(3)
    ours = SAM3(model, processor)
    frames = np.concatenate([SHOT.frames, SHOT.frames[::-1], SHOT.frames, SHOT.frames[::-1]])
    seen, held = ours.see(frames), []
    trim = SessionTrimmer.trim

    class Counting(SessionTrimmer):
        def trim(self, session, clock):
            trim(self, session, clock)
            sizes = [
                sum(x.numel() for x in about.values() if isinstance(x, torch.Tensor))
                for outputs in session.output_dict_per_obj.values()
                for part in outputs.values()
                for about in part.values()
            ]
            held.append(sum(sizes) / max(1, session.get_obj_num()))
            assert not session.obj_id_to_tracker_score_frame_wise

    ours.trimmer = Counting(model.config)
    ours.refer(seen, PHRASES[:1])
    assert len(held) == len(frames) == 56
    pointers = 128 * len(frames) // 4  # of frames in which a track was confirmed
    assert max(held[28:]) <= max(held[:28]) + pointers


def test_phrases_do_not_hear_each_other_and_frames_are_encoded_once(monkeypatch):
    model, processor = small_sam3(3)
    ours, calls = SAM3(model, processor), []
    encode = SAM3.encode

    def count(self, picture):
        calls.append(1)
        return encode(self, picture)

    monkeypatch.setattr(SAM3, "encode", count)
    seen = ours.see(SHOT.frames)
    both = ours.refer(seen, PHRASES)
    assert len(calls) == len(SHOT.frames)
    ours.kept = 0
    alone = ours.refer(ours.see(SHOT.frames), PHRASES[1:])
    assert len(calls) == 2 * len(SHOT.frames)
    assert torch.equal(alone.logits[0], both.logits[1])
    assert torch.equal(alone.present[0], both.present[1])
    assert (both.present > 0.99).all()


def test_components_and_suppression_are_those_of_plain_loops():
    from scipy import ndimage

    dice = np.random.default_rng(0)
    masks = (dice.random((3, 1, 15, 17)) < 0.4).astype(np.uint8)
    labels, counts = PlainKernels.cc_2d(torch.from_numpy(masks))
    for mask, label, count in zip(masks[:, 0], labels[:, 0].numpy(), counts[:, 0].numpy()):
        theirs, n = ndimage.label(mask, np.ones((3, 3)))
        assert label.max() == n and ((label > 0) == (mask > 0)).all()
        for i in range(1, n + 1):
            assert (count[theirs == i] == (theirs == i).sum()).all()
        assert (count[mask == 0] == 0).all()
    boxes = torch.from_numpy(dice.random((20, 2))).float() * 30
    boxes = torch.cat([boxes, boxes + 12], 1)
    from torchvision.ops import box_iou, nms

    scores = torch.from_numpy(dice.random(20)).float()
    ours = PlainKernels.generic_nms(box_iou(boxes, boxes), scores, 0.3)
    assert ours.tolist() == nms(boxes, scores, 0.3).tolist()


def test_long_sentences_are_shortened_and_sizes_refused():
    model, processor = small_sam3(3)
    ours = SAM3(model, processor)
    seen = ours.see(SHOT.frames[:2])
    with pytest.warns(Assumption, match="more than 32 tokens"):
        long = ours.refer(seen, ["the red circle " * 20])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Assumption)
        short = ours.refer(seen, [" ".join(["the red circle"] * 10)])
    assert torch.equal(long.logits, short.logits)
    with pytest.raises(Problem, match="SAM 3 sees pictures of 56×56 pixels"):
        ours.see(SHOT.frames, short_side=360)
    ours.longest_prompt = 2
    with pytest.raises(Problem, match="shorter words"):
        ours.check_sentence("circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam3")
    model, processor = small_sam3(3)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_folder_gives_both_halves(folder):
    assert isinstance(load_referring(folder), SAM3)
    assert isinstance(zoo.load(folder, reads=True), SAM3)
    model, _ = small_sam3(3)
    again = load_sam3(folder).model.state_dict()
    assert all(torch.equal(x, again[n]) for n, x in model.state_dict().items())


def test_a_tracker_alone_reads_no_sentence(tmp_path):
    for part in small_tracker("sam3"):
        part.save_pretrained(tmp_path)
    assert isinstance(zoo.load(tmp_path), SamPropagator)
    with pytest.raises(Problem, match="sam3_video"):
        load_referring(tmp_path)


def test_predict_reaches_it(folder, tmp_path):
    refshapes.write(tmp_path / "data", "valid", "easy", videos=1, seed=3, frames=4, size=(64, 96))
    report = predict(tmp_path / "data", tmp_path / "run", folder)
    assert len(report.done) == 1 and not report.failed
    assert list((tmp_path / "run" / "Annotations").rglob("*.png"))


def test_absent_weights_say_where_to_ask(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Problem, match=r"ask for access on huggingface\.co/facebook/sam3"):
        load_referring("facebook/sam3")
