"""The SAM 2 family behind the protocol:
small random trackers of all four kinds, against transformers' own walk over a whole clip."""

import numpy as np
import pytest
import torch

from rvos_nb.core import Problem
from rvos_nb.data import scenes
from rvos_nb.models.zoo import foreign_family
from rvos_nb.vos.sam2 import PUBLISHED_SAM, SamPropagator, load_sam, small_sam_config, small_tracker

KINDS = ("sam2", "sam2.1", "edgetam", "sam3")
SCENE = scenes.scene(3, "easy", frames=8, size=(48, 72))
FRAMES, LABELS = list(SCENE.frames), SCENE.labels.astype(np.uint8)


def small_sam(kind):
    return SamPropagator(*small_tracker(kind))


BLOCK = np.zeros((48, 72), np.uint8)
BLOCK[10:30, 20:40] = 1


@pytest.fixture(scope="module")
def trackers():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {kind: small_sam(kind) for kind in KINDS}
    torch.set_num_threads(before)


def track(tracker, frames, labels):
    tracker.start(frames[0].shape[:2])
    tracker.remember(frames[0], labels)
    return [tracker.step(f) for f in frames[1:]]


def logits(tracker, frames, labels):
    "What the session says, before probabilities: {object: (1, 1, h, w)} of the last frame."
    found = {}
    tracker.start(frames[0].shape[:2])
    tracker.remember(frames[0], labels)
    for frame in frames[1:]:
        tracker.session.clock += 1
        found = tracker.session.run_model(tracker.see(frame))
    return found


def whole_session(tracker, labels, key, reverse):
    "transformers' own iterator, with all frames in the session from the beginning."
    state = tracker.processor.init_video_session()
    for frame in FRAMES:
        state.add_new_frame(tracker.see(frame).pixels)
    ids = [int(k) for k in np.unique(labels) if k]
    tracker.processor.add_inputs_to_inference_session(
        state, key, obj_ids=list(ids), input_masks=[labels == k for k in ids]
    )
    tracker.model(inference_session=state, frame_idx=key)
    return {
        out.frame_idx: out.pred_masks
        for out in tracker.model.propagate_in_video_iterator(
            state, start_frame_idx=key, reverse=reverse
        )
    }


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_what_a_whole_session_says(kind, trackers):
    """Frame by frame, with the past forgotten,
    both directions give the logits of a session that holds everything."""
    tracker, key = trackers[kind], 3
    for frames, reverse in ((FRAMES[key:], False), (FRAMES[key::-1], True)):
        theirs = whole_session(tracker, LABELS[key], key, reverse)
        last = theirs[0 if reverse else len(FRAMES) - 1]
        ours = logits(tracker, frames, LABELS[key])
        assert len(ours) == len(last) == len(np.unique(LABELS[key])) - 1
        torch.testing.assert_close(
            torch.cat(list(ours.values())), last.float(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_protocol(kind, trackers):
    tracker, n = trackers[kind], int(LABELS[0].max())
    found = track(tracker, FRAMES, LABELS[0])
    for p in found:
        assert (
            p.shape == (n + 1, 48, 72)
            and p.dtype == torch.float32
            and torch.allclose(p.sum(0), torch.ones(()), atol=1e-5)
        )
    assert all(torch.equal(a, b) for a, b in zip(found, track(tracker, FRAMES, LABELS[0]))), (
        "the same again"
    )
    assert all(
        torch.equal(a, b) for a, b in zip(found, track(small_sam(kind), FRAMES, LABELS[0]))
    ), "the same from the same seed"
    one = track(tracker, FRAMES, BLOCK)
    moved = track(tracker, FRAMES, np.roll(BLOCK, 25, 1))
    assert one[0].shape == (2, 48, 72) and (one[-1] - moved[-1]).abs().max() > 1e-4, (
        "the mask given does not matter"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_objects_do_not_disturb_each_other(kind, trackers):
    both = logits(
        trackers[kind], FRAMES[:4], np.where(np.roll(BLOCK, 30, 1) > 0, 2, BLOCK).astype(np.uint8)
    )
    alone = logits(trackers[kind], FRAMES[:4], BLOCK)
    torch.testing.assert_close(both[1], alone[1], rtol=1e-4, atol=1e-5)
    assert set(both) == {1, 2} and not torch.allclose(both[1], both[2], atol=1e-4)


def held(session):
    "Numbers that a session holds."

    def count(x):
        return (
            x.numel()
            if isinstance(x, torch.Tensor)
            else sum(map(count, x.values() if isinstance(x, dict) else x))
            if isinstance(x, (dict, list, tuple))
            else 0
        )

    s = session.state
    return count(
        [
            s.processed_frames,
            s.output_dict_per_obj,
            s.mask_inputs_per_obj,
            s.point_inputs_per_obj,
            s.cache._vision_features,
        ]
    ), sum(map(len, s.frames_tracked_per_obj.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow(kind, trackers):
    tracker = trackers[kind]
    tracker.start((48, 72))
    tracker.remember(FRAMES[0], LABELS[0])
    sizes = []
    for t in range(1, 16):
        tracker.step(FRAMES[t % 8])
        if t in (4, 15):
            sizes.append(held(tracker.session))
    assert sizes[0] == sizes[1]
    for t in range(4):
        tracker.amend(np.roll(LABELS[1], t, 1))
        tracker.step(FRAMES[t])
    assert held(tracker.session) == sizes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_corrections_and_late_objects(kind, trackers):
    tracker = trackers[kind]

    def third(change):
        tracker.start((48, 72))
        tracker.remember(FRAMES[0], BLOCK)
        change(tracker.step(FRAMES[1]))
        return tracker.step(FRAMES[2])

    plain = third(lambda p: None)
    assert torch.equal(
        plain, third(lambda p: tracker.amend(p.max(0).indices.numpy().astype(np.uint8)))
    ), "its own answer is no news"
    assert (plain - third(lambda p: tracker.amend(np.roll(BLOCK, 25, 1)))).abs().max() > 1e-5
    assert third(lambda p: tracker.amend(BLOCK * 0)).isfinite().all(), "everything out of sight"
    late = third(
        lambda p: tracker.remember(FRAMES[1], np.roll(BLOCK, 25, 1) * 3)
    )  # object 3 comes, in the frame just seen; there is no object 2
    assert late.shape == (4, 48, 72) and late[2].max() < 1e-3 and tracker.session.clock == 2
    assert sorted(tracker.session.state.output_dict_per_obj[1]["cond_frame_outputs"]) == [1]
    again = third(
        lambda p: tracker.remember(FRAMES[1], np.roll(BLOCK, 25, 1))
    )  # a second reference for object 1
    assert sorted(tracker.session.state.output_dict_per_obj[0]["cond_frame_outputs"]) == [
        0,
        1,
    ] and not torch.allclose(again, plain, atol=1e-6)
    third(lambda p: tracker.remember(FRAMES[3], BLOCK))
    assert tracker.session.clock == 3


def test_walk_in_both_directions(trackers):
    from rvos_nb.propagation import walk

    tracker = trackers["sam2.1"]
    found = dict(walk(tracker, FRAMES[3:], FRAMES[3::-1], 3, LABELS[3]))
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7] and all(
        x.shape == (48, 72) and x.max() <= LABELS[3].max() for x in found.values()
    )
    ahead = track(tracker, FRAMES[3:], LABELS[3])
    assert np.array_equal(found[7], ahead[-1].max(0).indices.numpy())


def test_sentences_share_what_is_seen(trackers, monkeypatch):
    from rvos_nb.vos.propagator import AugmentedPropagator, Track, walk_tracks

    tracker, calls = trackers["edgetam"], []
    monkeypatch.setattr(
        tracker.model,
        "get_image_features",
        lambda *a, f=tracker.model.get_image_features, **k: (calls.append(1), f(*a, **k))[1],
    )
    given = [{0: BLOCK}, {2: np.roll(BLOCK, 20, 1)}]
    both = {
        (i, t): m
        for i, t, m in walk_tracks([Track(tracker.fork(), g) for g in given], enumerate(FRAMES))
    }
    assert len(calls) == len(FRAMES)
    for i, g in enumerate(given):
        assert all(
            np.array_equal(m, both[i, t])
            for _, t, m in walk_tracks([Track(tracker.fork(), g)], enumerate(FRAMES))
        )
    flipped = track(AugmentedPropagator(tracker, (1.0,), True), FRAMES[:3], BLOCK)
    assert flipped[-1].shape == (2, 48, 72) and not torch.equal(
        flipped[-1], track(tracker, FRAMES[:3], BLOCK)[-1]
    )
    with pytest.raises(Problem, match="scales"):
        AugmentedPropagator(tracker, (0.8, 1.0), False)


def test_without_an_object_all_is_background(trackers):
    found = track(trackers["sam2"], FRAMES[:3], BLOCK * 0)
    assert torch.equal(found[-1], torch.ones(1, 48, 72))


def test_bad_calls(trackers):
    tracker = small_sam("sam2")
    with pytest.raises(Problem, match="call start"):
        tracker.step(FRAMES[0])
    tracker.start((48, 72))
    for call, said in (
        (lambda: tracker.step(FRAMES[0]), "nothing remembered"),
        (lambda: tracker.remember(FRAMES[0][:9], BLOCK), "size given to start"),
        (lambda: tracker.remember(FRAMES[0], BLOCK[:9]), "one label per pixel"),
    ):
        with pytest.raises(Problem, match=said):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_folders(kind, trackers, tmp_path):
    from rvos_nb.propagation import make_propagator

    tracker = trackers[kind]
    tracker.model.save_pretrained(tmp_path)
    tracker.processor.save_pretrained(tmp_path)
    assert foreign_family(tmp_path)
    again = make_propagator(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(track(tracker, FRAMES[:3], BLOCK), track(again, FRAMES[:3], BLOCK))
    )
    if kind != "sam2":
        return
    import safetensors.torch

    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors.pop("no_memory_embedding")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Problem, match="no_memory_embedding"):
        load_sam(tmp_path)
    for name in ("model.safetensors", "processor_config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(Problem, match="does not load"):
            load_sam(tmp_path)


def test_the_tracker_of_a_whole_sam3(tmp_path):
    "The published file holds a detector too, and the tracker shares its backbone."
    from transformers import Sam3VideoConfig, Sam3VideoModel

    tracker, stack = (
        small_sam_config("sam3"),
        {"hidden_size": 128, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    text = {
        "model_type": "clip_text_model",
        "vocab_size": 9,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "max_position_embeddings": 8,
    }
    detector = {
        "model_type": "sam3",
        "vision_config": tracker["vision_config"],
        "text_config": text,
        "geometry_encoder_config": stack,
        "detr_encoder_config": stack,
        "detr_decoder_config": stack | {"num_queries": 5},
        "mask_decoder_config": {"hidden_size": 128, "num_attention_heads": 2},
    }
    whole = Sam3VideoModel(
        Sam3VideoConfig(
            detector_config=detector, tracker_config=tracker | {"model_type": "sam3_tracker_video"}
        )
    )
    whole.save_pretrained(tmp_path)
    small_tracker("sam3")[1].save_pretrained(tmp_path)
    found = load_sam(tmp_path)
    for ours, theirs in (
        (found.model.vision_encoder.backbone, whole.detector_model.vision_encoder.backbone),
        (found.model.vision_encoder.neck, whole.tracker_neck),
        (found.model.memory_attention, whole.tracker_model.memory_attention),
    ):
        theirs = theirs.state_dict()
        assert theirs and all(torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())
    assert track(found, FRAMES[:2], BLOCK)[0].shape == (2, 48, 72)


@pytest.mark.parametrize("name", PUBLISHED_SAM)
def test_absent_weights_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert foreign_family(name)
    with pytest.raises(Problem) as e:
        load_sam(name)
    assert (
        name in str(e.value)
        and "online=True" in str(e.value)
        and ("log in" in str(e.value)) == PUBLISHED_SAM[name].get("gated", False)
        and "\n" not in str(e.value)
    )
