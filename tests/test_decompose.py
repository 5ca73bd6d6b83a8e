"Sentences taken apart, by rules and by a language model, and phrases that a model is asked for."

import json

import numpy as np
import pytest
import torch

from rvos_nb.cli import main
from rvos_nb.core import Problem
from rvos_nb.data import refshapes
from rvos_nb.data.datasets import open_dataset
from rvos_nb.data.scenes import WORDS
from rvos_nb.decompose import (
    LanguageModelParser,
    RuleParser,
    SentenceParts,
    decompose_sentences,
    load_parser,
    read_sentence_parts,
    small_language_model,
)
from rvos_nb.models.referring import Candidates, Referring
from rvos_nb.predict import predict

SIZE = (48, 72)


class Recorder(Referring):
    "Answers with as many pixels as the sentence has letters, and notes what it was asked."

    def __init__(self):
        self.asked = []

    def see(self, frames, short_side=None):
        return np.shape(frames)

    def refer(self, seen, texts):
        self.asked.append(list(texts))
        t, h, w, _ = seen
        logits = torch.full((len(texts), t, h, w), -5.0)
        for i, text in enumerate(texts):
            logits[i, :, 0, : len(text)] = 5
        shape = (len(texts), t)
        return Candidates(logits, torch.ones(shape), torch.zeros(*shape, 4), (h, w))


@pytest.fixture
def tree(tmp_path):
    refshapes.write(tmp_path / "data", "valid", "hard", 2, seed=3, frames=4, size=SIZE)
    decompose_sentences(tmp_path / "data", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text, phrase, motion, relation, number",
    [
        ("a person on the left wearing a hat", "person", "wearing a hat", "on the left", "one"),
        ("A DOG, running!", "dog", "running", "", "one"),
        ("the two white rabbits that hop", "white rabbits", "hop", "", "several"),
        ("the group of men", "men", "", "", "several"),
        ("nobody on the boat", "nobody", "", "on the boat", "none"),
        ("none of the dogs", "dogs", "", "", "none"),
        ("no boat", "boat", "", "", "none"),
        ("second car from the left", "car", "", "second from the left", "one"),
        ("a t-shirt with stripes", "t-shirt", "", "with stripes", "one"),
        ("the bus", "bus", "", "", "one"),
        ("狗", "狗", "", "", "one"),
        ("...", "...", "", "", "one"),
    ],
)
def test_sentences_of_people(text, phrase, motion, relation, number):
    p = RuleParser().parse(text)
    assert (p.phrase, p.motion, p.relation, p.number) == (phrase, motion, relation, number)


def test_any_text_has_a_phrase():
    "Whatever is drawn from these words, there is something to ask for."
    dice = np.random.default_rng(0)
    words = ["the", "no", "of", "left", "that", "is", "dog", "dogs", "running", "and", "pair", ","]
    for _ in range(2000):
        text = " ".join(dice.choice(words, dice.integers(1, 7)))
        p = RuleParser().parse(text)
        assert p.phrase.strip() and p.head.strip()


def test_a_model_is_asked_for_phrases_once_each(tree):
    model, data = Recorder(), open_dataset(tree / "data")
    report = predict(tree / "data", tree / "run", model, phrases=tree / "parts.json")
    assert not report.failed
    parts = read_sentence_parts(tree / "parts.json")
    for texts, v in zip(model.asked, data.videos):
        phrases = [parts[v][e.id].phrase for e in data.expressions[v]]
        assert texts == list(dict.fromkeys(phrases)) and len(texts) < len(phrases)
    for e in data:
        masks = sorted((tree / "run/Annotations" / e.video / e.id).iterdir())
        from rvos_nb.data.masks import read_mask

        assert read_mask(masks[0]).sum() == len(parts[e.video][e.id].phrase)
    assert json.loads((tree / "run/run.json").read_text())["params"]["phrases"] == "parts.json"


def test_a_mended_phrase_is_asked_again(tree):
    listing = json.loads((tree / "parts.json").read_text())
    predict(tree / "data", tree / "run", Recorder(), phrases=tree / "parts.json")
    v = next(iter(listing))
    listing[v]["0"]["phrase"] = "dinosaur"
    (tree / "parts.json").write_text(json.dumps(listing))
    model = Recorder()
    report = predict(tree / "data", tree / "run", model, phrases=tree / "parts.json")
    assert report.done == [v] and "dinosaur" in model.asked[0]


def test_whole_sentences_are_asked_without_phrases(tree):
    model, data = Recorder(), open_dataset(tree / "data")
    predict(tree / "data", tree / "run", model)
    assert model.asked == [[e.text for e in es] for es in data.expressions.values()]
    assert "phrases" not in json.loads((tree / "run/run.json").read_text())["params"]


@pytest.mark.parametrize("change", ["lose", "number", "list", "text"])
def test_parts_that_are_odd(tree, change):
    listing = json.loads((tree / "parts.json").read_text())
    v = next(iter(listing))
    if change == "lose":
        del listing[v]["0"]
    else:
        values = {"number": "four", "list": {"looks": "red"}, "text": 3}
        listing[v]["0"] |= {"number": "four"} if change == "number" else {}
        if change == "list":
            listing[v]["0"]["looks"] = values["list"]
        if change == "text":
            listing[v]["0"]["phrase"] = values["text"]
    (tree / "parts.json").write_text(json.dumps(listing))
    with pytest.raises(Problem, match=r"parts\.json"):
        predict(tree / "data", tree / "run", Recorder(), phrases=tree / "parts.json")
    assert not (tree / "run/Annotations").exists()


class Talkative(LanguageModelParser):
    def __init__(self, said):
        self.said, self.rules = said, RuleParser()

    def ask(self, question):
        return self.said


def test_a_language_model_is_believed_where_it_says_json():
    said = (
        '```json\n{"phrase": "old winner", "head": "winner", "looks": ["old"], "number": "several"}'
    )
    found = Talkative(said).parse("those who will win")
    assert found == SentenceParts("old winner", "winner", ("old",), number="several")
    for odd in ("", "{", '{"phrase": 3}', '{"phrase": "a", "head": "a", "number": "lots"}'):
        assert Talkative(odd).parse("a red dog") == RuleParser().parse("a red dog")


def test_a_language_model_from_a_folder(tmp_path):
    for part in small_language_model(WORDS, seed=2):
        part.save_pretrained(tmp_path / "model")
    refshapes.write(tmp_path / "data", "valid", "easy", 1, seed=3, frames=2, size=SIZE)
    slow = decompose_sentences(tmp_path / "data", tmp_path / "a", parser=tmp_path / "model")
    assert slow == decompose_sentences(tmp_path / "data", tmp_path / "b")
    with pytest.raises(Problem, match="language model"):
        load_parser(tmp_path / "data")
    (tmp_path / "model/config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(Problem, match="tokenizer"):
        load_parser(tmp_path / "model")


def test_a_clip_has_no_phrases(tree, capsys):
    frames = next((tree / "data/valid/JPEGImages").iterdir())
    with pytest.raises(SystemExit) as end:
        main(["predict", str(frames), "the dog", "--phrases", "parts.json"])
    assert end.value.code == 1 and "--phrases" in capsys.readouterr().err
