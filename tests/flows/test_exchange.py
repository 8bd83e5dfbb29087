"""`prefixfleet import` and `prefixfleet export`: to and from PEFT, through the registry."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flows import work
from flows.cli import main
from pipeline.home import Home
from pipeline.prefix import load_prefix


@pytest.fixture
def adapter(tmp_path: Path, example_base: Path) -> Path:
    """A random adapter for the example base, as PEFT saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(example_base, dtype=torch.float32)
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_goes_in_answers_and_comes_out_again(
    adapter: Path, home: Home, tmp_path: Path, example_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "--customer", "acme", "--format", "peft", str(adapter), "--template", r"Say: {input}\n", "--json"]
    assert main([*command, "--champion"]) == 0
    imported = json.loads(capsys.readouterr().out)
    assert (imported["version"], imported["alias"]) == (1, "champion")
    config = json.loads((Path(imported["prefix"]) / "prefix.json").read_text())
    assert config["prompt"]["template"] == "Say: {input}\n" and config["base"]["path"] == str(example_base)

    assert main(command) == 0  # once more: the same version, and its alias stays
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert main(["generate", "--customer", "acme", "--input", "hello"]) == 0
    assert main(["status"]) == 0
    capsys.readouterr()

    out = tmp_path / "out"
    assert main(["export", "--customer", "acme", "--format", "peft", str(out)]) == 0
    assert torch.equal(
        load_file(out / "adapter_model.safetensors")["prompt_embeddings"],
        load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"],
    )
    model = AutoModelForCausalLM.from_pretrained(example_base, dtype=torch.float32)
    assert PeftModel.from_pretrained(model, out).active_peft_config.num_virtual_tokens == 3
    assert main(["export", "--customer", "acme", "--format", "peft", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_an_import_takes_base_and_prompt_from_the_fleet_file_and_gets_no_alias_unasked(
    adapter: Path, home: Home, fleet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", "--customer", "bolt", "--format", "peft", str(adapter), "--fleet", str(fleet_file)]
    assert main(command) == 0
    assert "bolt version 1 registered; not evaluated, so no alias" in capsys.readouterr().out
    assert main(["generate", "--customer", "bolt", "--input", "hello"]) == 1
    assert "no version holds the alias 'champion'" in capsys.readouterr().err
    assert main([*command, "--customer", "nobody"]) == 2
    assert "not in the fleet file" in capsys.readouterr().err


def test_an_import_without_a_known_base_says_how_to_name_it(
    adapter: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    assert main(["import", "--customer", "acme", "--format", "peft", str(adapter)]) == 2
    assert "--base" in capsys.readouterr().err


def test_training_starts_from_the_champion_of_the_moment(adapter: Path, home: Home, fleet_file: Path) -> None:
    """As `prefixfleet train` finds it when it writes the job; bolt has no champion, acme's is imported."""
    assert main(["import", "--customer", "acme", "--format", "peft", str(adapter), "--fleet", str(fleet_file), "--champion"]) == 0
    text = fleet_file.read_text().replace(
        "customers:", "defaults: {prefix: {length: 3, init: prefix, init_prefix: champion}}\ncustomers:"
    )
    fleet_file.write_text(text)
    assert main(["prepare", str(fleet_file)]) == 0
    todo = work.open_work(fleet_file, ["acme", "bolt"], home)
    work.survey(todo)
    (planned,) = todo.plan()
    champions = work._champions(planned)
    assert [str(key) for key in champions] == ["acme"]
    prefix, config = load_prefix(champions[planned.job.customers[0].key])
    assert config["customer"] == "acme" and next(iter(prefix.values()))[0].shape[1] == 3
