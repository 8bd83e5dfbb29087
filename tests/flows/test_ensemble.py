"""`prefixfleet ensemble`: versions that answer together, judged as any candidate and registered as one version that names them."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows import launch
from flows.cli import main
from pipeline.base import resolve_base
from pipeline.config import PromptSettings
from pipeline.errors import PrefixError
from pipeline.files import read_json
from pipeline.home import Home
from pipeline.keys import CustomerKey
from pipeline.prefix import load_prefix, save_prefix
from pipeline.prefix.bank import Site
from pipeline.prefix.initialise import from_random
from pipeline.registry import lookup, register_imported

SITES = {f"decoder.self.{layer}": Site(2, 64) for layer in range(10)}


@pytest.fixture
def fleet(tmp_path: Path, fleet_file: Path) -> Path:
    """Answers of five tokens, and nothing that takes long."""
    fast = "prompt_baseline: false, max_new_tokens: 5, bootstrap_resamples: 1000"
    fast = f"defaults:\n  evaluation: {{metrics: [bleu, rougeL, chrf, perplexity], {fast}}}\ncustomers:"
    fleet_file.write_text(fleet_file.read_text().replace("customers:", fast))
    return fleet_file


@pytest.fixture
def version(tmp_path: Path, home: Home, fleet: Path, example_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Register a random prefix for bolt; children of stages run in this process."""

    def in_process(module: str, job_file: Path, *_: Any) -> None:
        from pipeline.evaluation.run import evaluate_job
        from pipeline.inference import load_engine
        from pipeline.training.job import read_job

        assert module == "pipeline.evaluation"
        with contextlib.redirect_stdout(io.StringIO()):  # a child's goes to its flow
            evaluate_job(read_job(job_file), load_engine)

    monkeypatch.setattr(launch, "run_module", in_process)
    base = resolve_base(str(example_base))
    prompt = PromptSettings().model_dump(mode="json")

    def make(seed: int, length: int = 3, **changed: Any) -> int:
        config = {
            "customer": "bolt", "task": "default", "digest": f"{seed:02d}{length:02d}" * 16,
            "prefix": {"length": length, "sites": {name: vars(site) for name, site in SITES.items()}, "placement": "prefix"},
            "prompt": prompt, "chat": False, "generation": {"num_beams": 1, "max_new_tokens": 5},
            "base": {
                "id": "examples/base", "path": str(example_base), "revision": None, "digest": base.digest, "dtype": "bfloat16",
                "tokenizer_digest": base.tokenizer_digest, "model_type": "llama", "is_encoder_decoder": False, "quantization": None,
            },
            "training": {}, "run_id": None,
            "lineage": {"data_fingerprint": "d", "config_digest": "c", "seed": seed, "code_version": "test", "parent": None},
            **changed,
        }  # fmt: skip
        folder = tmp_path / f"v{seed}-{length}"
        save_prefix(folder, from_random(SITES, length, seed), config)
        return register_imported(folder, "a test", champion=False).version

    return make


def test_versions_become_an_ensemble_that_is_judged_registered_and_answers(
    version: Callable[..., int], fleet: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, length in ((1, 3), (2, 3), (3, 5)):
        version(seed, length)
    assert main(["prepare", str(fleet), "--customer", "bolt"]) == 0
    command = ["ensemble", str(fleet), "--customer", "bolt", "--json", "--versions"]
    capsys.readouterr()
    made = {}
    for versions, average in (("1,2,3", "probabilities"), ("1,2", "parameters")):
        assert main([*command, versions, "--average", average]) == 0
        (row,) = json.loads(capsys.readouterr().out)["customers"]
        assert row["decision"] in ("promote", "reject", "keep") and row["base_score"] is not None
        made[average] = row["version"]
    assert made == {"probabilities": 4, "parameters": 5}
    assert main([*command, "1,2,3"]) == 0  # once more: the same version
    assert json.loads(capsys.readouterr().out)["customers"][0]["version"] == 4

    key = CustomerKey("bolt")
    found = lookup(key, version=4)
    told = read_json(found.prefix_dir / "prefix.json", 1)["ensemble"]
    assert [member["name"] for member in told["members"]] == ["version 1", "version 2", "version 3"]
    assert found.tags["ensemble"] == "probabilities of version 1, version 2, version 3"
    members = [lookup(key, version=number).prefix_dir for number in (1, 2, 3)]
    stored = load_file(found.prefix_dir / "prefix.safetensors")
    for i, member in enumerate(members):
        for site, (keys, values) in load_prefix(member)[0].items():
            assert torch.equal(stored[f"{i}.{site}.key"], keys) and torch.equal(stored[f"{i}.{site}.value"], values)
    mean, _ = load_prefix(lookup(key, version=5).prefix_dir)
    first, second = (load_prefix(member)[0] for member in members[:2])
    for site, (keys, values) in mean.items():
        assert torch.allclose(keys, (first[site][0] + second[site][0]) / 2)
        assert torch.allclose(values, (first[site][1] + second[site][1]) / 2)

    judged = [read_json(file, 1)["scores"] for file in home.root.glob("evaluations/bolt/default/*/metrics.json")]
    assert all(scores["prefix"].keys() == scores["base"].keys() for scores in judged)
    perplexities = {system: {str(scores[system]["perplexity"]) for scores in judged} for system in ("base", "prefix")}
    assert (
        len(perplexities["base"]) == 1 and len(perplexities["prefix"]) == 2
    )  # of averaged predictions, and of averaged parameters
    assert main(["generate", "--customer", "bolt", "--version", "4", "--input", "name : bolt 3 | food : soup"]) == 0
    with pytest.raises(PrefixError, match="ensemble of 3"):
        load_prefix(found.prefix_dir)
    assert main(["export", "--customer", "bolt", "--version", "4", "--format", "peft", str(home.root / "out")]) == 1


def test_versions_that_do_not_go_together_are_refused_by_name(
    version: Callable[..., int], fleet: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    version(1, 3)
    version(2, 5)
    version(3, 3, generation={"num_beams": 4, "max_new_tokens": 5})
    assert main(["prepare", str(fleet), "--customer", "bolt"]) == 0

    def refused(versions: str, *more: str) -> str:
        capsys.readouterr()
        assert main(["ensemble", str(fleet), "--customer", "bolt", "--versions", versions, *more]) in (1, 2)
        return capsys.readouterr().err

    assert "another length" in refused("1,2", "--average", "parameters")
    assert "version 3 differs from version 1 in generation" in refused("1,3")
    assert "2 to 16 members" in refused("1")
    assert "the same weights" in refused("1,1")
    assert "no version 9" in refused("1,9")
    assert "--versions" in refused("one,two")
