"""The embedded base's own scripts: the mix that it was trained on and the loss that it was trained with."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["amber", "bridge", "candle", "dragon", "ember", "forest", "garden", "harbor", "island", "jungle", "kettle", "lantern"]
NAMES = ["Adalind", "Berrigan", "Calloway", "Dunmore", "Everard", "Fenwick", "Galloway", "Hartwell", "Ingram", "Jessamy"]


@pytest.fixture
def scripts(example_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of examples/base, which import each other by their bare names."""
    import importlib

    monkeypatch.syspath_prepend(str(example_base))
    return {name: importlib.import_module(name) for name in ("sources", "mix", "pretrain", "overlap", "by_relation")}


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


def git(folder: Path, *words: str) -> str:
    """What git prints there."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_sources_are_read_at_the_commits_named_and_no_other(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = scripts["sources"]
    for name in ("moved", "other"):
        git(tmp_path, "init", "-q", name)
        (tmp_path / name / "text.txt").write_text("as it was")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-qm", "one")
    pinned = git(tmp_path / "moved", "rev-parse", "HEAD")
    (tmp_path / "moved" / "text.txt").write_text("as it is")
    git(tmp_path / "moved", "commit", "-qam", "two")
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "data.noun").write_text("as it was")
    digest = hashlib.sha256(b"as it was").hexdigest()
    monkeypatch.setattr(sources, "COMMITS", {"moved": ("owner/moved", pinned)})
    monkeypatch.setattr(sources, "WORDNET", {"data.noun": digest})
    assert sources.missing(tmp_path) == []
    assert sources.blob(tmp_path / "moved", "text.txt") == "as it was"
    assert list(sources.blobs(tmp_path / "moved", "", ".txt")) == [("text.txt", "as it was")]

    monkeypatch.setattr(sources, "COMMITS", {"other": ("owner/other", "1" * 40), "absent": ("owner/absent", "2" * 40)})
    (tmp_path / "wordnet" / "data.noun").write_text("as it is")
    monkeypatch.setattr(sys, "argv", ["sources.py", str(tmp_path), "--out", str(tmp_path / "out.xz")])
    with pytest.raises(SystemExit) as stop:
        sources.main()
    lines = str(stop.value).splitlines()
    assert [line.split(":")[0] for line in lines[1::2]] == ["# other", "# absent", f"# {tmp_path / 'wordnet' / 'data.noun'}"]
    assert f"fetch --depth 1 https://github.com/owner/other {'1' * 40}" in lines[2]
    assert "wordnet-base" in lines[6]
    assert not (tmp_path / "out.xz").exists()


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


def test_overlap_tells_relations_of_the_grammar_from_others(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["The Kiln House is in Oldacre.", "Oldacre is proud to hold the Kiln House."]  # the first is the grammar's "is in {o}"
    records = [
        {"input": "Kiln_House : location : Oldacre", "references": said},
        {"input": "Kiln_House : location : Oldacre | Oldacre : ghostCount : 3", "target": "Kiln House is in Oldacre."},
        {"input": "name : Kiln House", "target": "No triple."},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    overlap = scripts["overlap"]
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--relations", "--against", str(tmp_path), "--max", "0.5"])
    with pytest.raises(SystemExit, match="more than 50% of: their occurrences"):
        overlap.main()
    assert [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "relation names: 1 of 2 (50.0%)",
        "their occurrences: 2 of 3 (66.7%)",
        "references of one triple: 1 of 2 (50.0%)",
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "0.7"])
    overlap.main()


def test_scores_are_told_apart_by_whether_the_base_knew_the_relations(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = "The old house stands in Oldacre today.", "Nobody ever said anything about that place."
    rows = [("H : location : Oldacre", right), ("H : ghostCount : 3", wrong), ("H : location : O | H : ghostCount : 3", wrong)]
    lines = [json.dumps({"input": text, "references": [right], "output": output}) + "\n" for text, output in rows]
    (tmp_path / "houses-prefix-0.1.jsonl").write_text("".join(lines))
    (tmp_path / "barns-prefix-0.1.jsonl").write_text(lines[0])
    monkeypatch.setattr(sys, "argv", ["by_relation.py", *map(str, sorted(tmp_path.iterdir()))])
    scripts["by_relation"].main()
    alone = sacrebleu.corpus_bleu([wrong], [[right]]).score
    both = sacrebleu.corpus_bleu([wrong, wrong], [[right, right]]).score
    rows = [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row for row in rows if row[1:] != ["–", "–"]] == [
        ["1", "100.0 (2 inputs)", f"{alone:.1f} (1 inputs)"],
        ["2", "–", f"{alone:.1f} (1 inputs)"],
        ["all", "100.0 (2 inputs)", f"{both:.1f} (2 inputs)"],
    ]


def test_loss_is_on_every_token_of_what_is_learned_and_on_no_other(
    scripts: dict[str, ModuleType], material: Any, example_base: Path
) -> None:
    pretrain, mix = scripts["pretrain"], scripts["mix"].Mix(material)
    tokenizer = AutoTokenizer.from_pretrained(example_base)
    tokens = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    seen = {True: 0, False: 0}
    for seed in range(60):
        row: list[tuple[int, bool]] = []  # (token, whether it is to be learned)
        for doc in mix.window(Random(seed)):
            target = tokens(doc.target)[: doc.cut] if doc.cut else [*tokens(doc.target), tokenizer.eos_token_id]
            row += [(i, False) for i in (tokens(doc.input + "\n") if doc.input else [])] + [(i, doc.learn) for i in target]
            seen[doc.learn] += 1
            if len(row) >= 256:
                break
        ids, labels = pretrain.split_labels(torch.from_numpy(pretrain.window(mix, tokenizer, Random(seed), 256))[None])
        assert ids[0].tolist() == [token for token, _ in row[:256]]
        # Position n predicts token n + 1, so the first token is never learned and the last position predicts nothing.
        assert labels[0].tolist() == [token if learn else -100 for token, learn in row[1:256]] + [-100]
    assert min(seen.values()) > 20


def test_pretraining_loss_equals_that_of_transformers(scripts: dict[str, ModuleType], example_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(example_base, dtype=torch.float32)
    ids = torch.randint(2, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    own = scripts["pretrain"].Loss(model, torch.float32, compiled=False)(ids, labels)
    assert own.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-4)


@pytest.fixture
def run(
    scripts: dict[str, ModuleType], material: Any, example_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`run(name, *arguments)`: a smoke run of pretrain.py in this process, with a checkpoint after every step; its folder."""
    pretrain = scripts["pretrain"]
    monkeypatch.setattr(pretrain, "sample", lambda *_: "")  # what is generated for reading is slow and beside the point
    material.write(tmp_path / "material.json.xz")

    def go(name: str, *more: str) -> Path:
        out = tmp_path / name
        if not (out / "tokenizer").exists():
            AutoTokenizer.from_pretrained(example_base).save_pretrained(out / "tokenizer")
        given = [
            "--material",
            str(tmp_path / "material.json.xz"),
            "--out",
            str(out),
            "--smoke",
            "--device",
            "cpu",
            "--threads",
            "1",
        ]
        pretrain.train(pretrain.arguments([*given, "--workers", "0", "--minutes", "60", "--eval-minutes", "0", *more]))
        return out

    return go


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run without its clock."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("minutes", "lr", "again")} for row in rows]


def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_been(
    scripts: dict[str, ModuleType], run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", "--max-steps", "24")
    halves = tmp_path / "halves"
    step, seen, shards = scripts["pretrain"].Optimiser.step, itertools.count(), []

    def stops(*args: Any) -> Any:
        if next(seen) == 11:  # inside a shard, and inside the twenty steps that one row of the log is the mean of
            shards.extend(halves.glob("shards-*"))
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scripts["pretrain"].Optimiser, "step", stops)
        run("halves", "--max-steps", "24")
    assert len(shards) == 1
    assert not shards[0].exists()
    shards[0].mkdir()  # what a kill would have left: shards, a row past the checkpoint, half a row
    log = halves / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 12, "held_out": 0.0}\n{"step": 13, "hel')
    run("halves", "--max-steps", "24")
    rows = rows_of(halves)
    assert rows == rows_of(whole)
    assert [row["step"] for row in rows if "held_out" in row] == list(range(1, 25))
    assert rows[-1]["held_out"] < rows[0]["held_out"]
    assert not list(halves.glob("shards-*"))
    assert AutoModelForCausalLM.from_pretrained(halves / "best").config.hidden_size == 32


def test_a_run_ends_with_the_error_of_a_process_that_draws_windows(
    scripts: dict[str, ModuleType], material: Any, tmp_path: Path
) -> None:
    pretrain = scripts["pretrain"]
    material.write(tmp_path / "material.json.xz")
    (tmp_path / "wanted").write_text("0")
    given = (tmp_path / "material.json.xz", tmp_path / "no-tokenizer", tmp_path, 1, 0, 1, 4, 128, 1024)
    fork = multiprocessing.get_context("fork")
    broken = fork.Process(target=pretrain.worker, args=given)
    broken.start()
    killed = fork.Process(target=time.sleep, args=(600,))
    killed.start()
    killed.kill()
    for dead, status, why in ((broken, 1, "no-tokenizer"), (killed, -9, "memory")):
        with pytest.raises(pretrain.RunError, match=rf"(?s)exit status {status}\..*{why}"):
            next(pretrain.shards(tmp_path, 0, Random(0), 128, [dead]))


def test_two_runs_do_not_share_a_folder(scripts: dict[str, ModuleType], run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with (tmp_path / "one" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(scripts["pretrain"].RunError, match=r"another run is at work in .*one"):
            run("one")


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_and_leaves_nothing_behind(
    example_base: Path, run: Callable[..., Path], material: Any, tmp_path: Path
) -> None:
    more = ["--max-steps", "40", "--eval-minutes", "0.005"]  # twenty shards: too few for one to be seen again
    whole = run("whole", *more)
    AutoTokenizer.from_pretrained(example_base).save_pretrained(tmp_path / "killed" / "tokenizer")
    command = [sys.executable, str(example_base / "pretrain.py"), "--material", str(tmp_path / "material.json.xz")]
    command += [
        "--out",
        str(tmp_path / "killed"),
        "--smoke",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--workers",
        "1",
        "--minutes",
        "60",
    ]
    command += more
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for = time.monotonic() + 600
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and time.monotonic() < wait_for and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert len(list((tmp_path / "killed").glob("shards-*"))) == 1
    run("killed", *more)
    assert not list((tmp_path / "killed").glob("shards-*"))
    assert rows_of(tmp_path / "killed")[-1]["step"] == 40
    assert rows_of(tmp_path / "killed")[-1]["held_out"] == rows_of(whole)[-1]["held_out"]
