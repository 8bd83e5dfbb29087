"""The embedded base's own scripts: the mix that it was trained on and the loss that it was trained with."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["amber", "bridge", "candle", "dragon", "ember", "forest", "garden", "harbor", "island", "jungle", "kettle", "lantern"]
NAMES = ["Adalind", "Berrigan", "Calloway", "Dunmore", "Everard", "Fenwick", "Galloway", "Hartwell", "Ingram", "Jessamy"]


@pytest.fixture
def scripts(example_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of examples/base, which import each other by their bare names."""
    import importlib

    monkeypatch.syspath_prepend(str(example_base))
    return {name: importlib.import_module(name) for name in ("sources", "mix", "pretrain")}


@pytest.fixture
def material(scripts: dict[str, ModuleType]) -> Any:
    """A few invented texts of every kind that the sources have."""
    turn = scripts["sources"].Turn
    turns = [
        turn(
            "USER",
            "I want a table at Ember Hall.",
            [("INFORM_INTENT", "", "ReserveRestaurant"), ("INFORM", "city", "Oldacre")],
            [],
        ),
        turn("SYSTEM", "Ember Hall in Oldacre has one.", [("OFFER", "restaurant_name", "Ember Hall")], ["Ember Hall"]),
    ]
    sentence = "In 1950 Ines Calloway moved to Port Oldacre, where she founded Amber Records with Tom Fenwick."
    lists = {name: NAMES for name in ("first", "last", "cities", "countries", "states", "rivers")}
    lists |= {"nationalities": ["Danish", "Norwegian", "Japanese"], "genres": ["jazz"], "jobs": ["baker"], "dishes": ["soup"]}
    lists |= {"foods": WORDS, "adjectives": WORDS, "nouns": WORDS}
    return scripts["sources"].Material(
        wiki=[(sentence, [sentence, "She lived in Port Oldacre until 1990."])] * 3,
        fewrel=[(sentence, "Amber Records", "founded by", "Ines Calloway")],
        relation_names=["founded by", "place of birth", "member of", "owner", "colour", "author", "language"],
        acts=[("inform hotel", [("name", "Ember Hall"), ("area", "harbour")], ["Ember Hall is in the harbour area."])],
        sgd=[("Restaurants", turns)],
        taskmaster=[([("name", "Ember Hall")], "Ember Hall is open.")],
        drive_through=[[("User", "One soup, please."), ("Assistant", "Anything else?")]],
        prose=[("A day", ["The forest was quiet. No bird sang. Then the rain came.", "It rained."])],
        countries=[("Oldacre", "Climate", "mild and wet all year")],
        glosses=[(word, "noun", f"a kind of {word}", f"they saw the {word} again") for word in WORDS],
        questions=[("who founded amber records?", "Ines Calloway", sentence)],
        lists=lists,
    )


def test_material_survives_its_compact_file(scripts: dict[str, ModuleType], material: Any, tmp_path: Path) -> None:
    material.write(tmp_path / "material.json.xz")
    again = scripts["sources"].Material.read(tmp_path / "material.json.xz")
    assert list(again.texts()) == list(material.texts())
    assert again.lists == material.lists


def test_nothing_is_put_into_words_before_something_asks_for_it(scripts: dict[str, ModuleType], material: Any) -> None:
    module, mix = scripts["mix"], scripts["mix"].Mix(material)
    tasks = [*module.ROW_TASKS.values(), *mix.textual]
    known = {*module.VERBAL, *(instruction for instructions, _ in tasks for instruction in instructions)}
    cold: dict[str, int] = {}
    for seed in range(400):
        first = next(mix.window(Random(seed)))  # nothing stands before the first document of a window
        lines = first.input.split("\n")
        if first.learn and first.input and not known & {lines[0], lines[-1]}:
            cold[first.source] = cold.get(first.source, 0) + 1
    assert list(cold) == ["rows"]
    assert cold["rows"] > 20


def test_a_shard_is_a_function_of_its_name(scripts: dict[str, ModuleType], material: Any, example_base: Path) -> None:
    mix, tokenizer = scripts["mix"].Mix(material), AutoTokenizer.from_pretrained(example_base)
    windows = [scripts["pretrain"].window(mix, tokenizer, Random(name), 128) for name in ("1-0", "1-0", "1-1")]
    assert (windows[0] == windows[1]).all()
    assert (windows[0] != windows[2]).any()


def test_loss_is_on_targets_and_on_nothing_that_is_only_shown(
    scripts: dict[str, ModuleType], material: Any, example_base: Path
) -> None:
    pretrain, mix = scripts["pretrain"], scripts["mix"].Mix(material)
    tokenizer = AutoTokenizer.from_pretrained(example_base)
    for seed in range(30):
        window = torch.from_numpy(pretrain.window(mix, tokenizer, Random(seed), 256))
        ids, labels = pretrain.split_labels(window[None])
        wanted = ""
        for doc in itertools.islice(mix.window(Random(seed)), 40):
            wanted += doc.target + tokenizer.eos_token if doc.learn else ""
        learned = tokenizer.decode(labels[labels != -100].tolist())
        # A first token has nothing before it, so a window that begins with plain text learns it without its first token.
        assert learned and (wanted.startswith(learned) or learned in wanted)
        assert (ids[0, 1:][labels[0, :-1] != -100] == labels[0, :-1][labels[0, :-1] != -100]).all()


def test_pretraining_loss_equals_that_of_transformers(scripts: dict[str, ModuleType], example_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(example_base, dtype=torch.float32)
    ids = torch.randint(2, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    own = scripts["pretrain"].Loss(model, torch.float32, compiled=False)(ids, labels)
    assert own.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-4)
