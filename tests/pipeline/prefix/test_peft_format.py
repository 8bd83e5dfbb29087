"""Adapter folders: what PEFT loads of ours and what we load of PEFT's give equal logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file

from pipeline.errors import PrefixError
from pipeline.prefix import FrozenBase, Prefix, PrefixBank, attach, save_prefix
from pipeline.prefix.initialise import from_text
from pipeline.prefix.peft_format import export_peft, import_peft

from .families import ENCODER_DECODER, ONE_SIZE, some_ids, tiny_model

TEXT = [5, 6, 7, 8]


def saved(folder: Path, base: FrozenBase, prefix: Prefix, **settings: Any) -> Path:
    config = {
        "base": {"id": "some/base", "revision": None, "digest": "b" * 64, "is_encoder_decoder": base.is_encoder_decoder},
        "prefix": {"length": 4, "layers": "all", "placement": "prefix", **settings},
    }
    save_prefix(folder, prefix, config)
    return folder


def of_decoder(base: FrozenBase) -> Prefix:
    return {name: pair for name, pair in from_text(base, TEXT, 4).items() if name.startswith("decoder.self")}


def ours(base: FrozenBase, prefix: Prefix) -> torch.Tensor:
    bank = PrefixBank(base.sites, slots=1, length=4)
    bank.put(0, prefix)
    with base.prefixes(bank, torch.tensor([0, 0])):
        return base.model(**inputs(base)).logits


def inputs(base: FrozenBase) -> dict[str, torch.Tensor]:
    ids = some_ids(2, 6)
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return known | ({"decoder_input_ids": ids[:, :5]} if base.is_encoder_decoder else {})


@pytest.mark.parametrize("family", ONE_SIZE + ENCODER_DECODER)
@torch.no_grad()
def test_an_exported_prefix_loads_in_peft_with_equal_logits(tmp_path: Path, family: str) -> None:
    base = attach(tiny_model(family).eval())
    prefix = of_decoder(base)
    export_peft(saved(tmp_path / "p", base, prefix), tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_model(family).eval(), tmp_path / "out").eval()
    torch.testing.assert_close(theirs(**inputs(base)).logits[:, -5:], ours(base, prefix)[:, -5:], atol=1e-5, rtol=0)
    # and comes back as it was
    again = import_peft(tmp_path / "out", base)
    assert all(torch.equal(again[s][i], prefix[s][i]) for s in prefix for i in (0, 1))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", *ENCODER_DECODER])
@torch.no_grad()
def test_prefix_tuning_of_peft_is_imported_with_equal_logits(tmp_path: Path, family: str, projection: bool) -> None:
    base = attach(tiny_model(family).eval())
    site = base.sites["decoder.self.0"]
    kind = "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM"
    layers = len([name for name in base.sites if name.startswith("decoder.self")])
    shape = {"num_layers": layers, "num_attention_heads": site.heads, "token_dim": site.heads * site.head_dim}
    config = PrefixTuningConfig(
        task_type=kind, num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=16, **shape
    )
    theirs = get_peft_model(tiny_model(family), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    prefix = import_peft(tmp_path / "adapter", base)
    torch.testing.assert_close(ours(base, prefix)[:, -5:], theirs(**inputs(base)).logits[:, -5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_prompt_tuning_of_peft_is_imported_as_keys_and_values_with_equal_logits(tmp_path: Path, family: str) -> None:
    base = attach(tiny_model(family).eval())
    theirs = get_peft_model(tiny_model(family), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    prefix = import_peft(tmp_path / "adapter", base)
    expected = theirs(**inputs(base)).logits[:, 4:]
    torch.testing.assert_close(ours(base, prefix), expected, atol=1e-5, rtol=0)


def test_an_encoder_saved_with_its_mlp_is_projected(tmp_path: Path) -> None:
    base = attach(tiny_model("gpt2"))
    theirs = get_peft_model(
        tiny_model("gpt2"),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16),
    )
    theirs.save_pretrained(tmp_path)
    flat = import_peft(tmp_path, base)
    encoder = theirs.prompt_encoder["default"].state_dict()
    save_file({f"prompt_encoder.default.{k}": v for k, v in encoder.items()}, tmp_path / "adapter_model.safetensors")
    whole = import_peft(tmp_path, base)
    for site in base.sites:
        torch.testing.assert_close(whole[site][0], flat[site][0])


def test_what_peft_does_not_know_is_refused_with_the_reason(tmp_path: Path) -> None:
    llama, bart, gemma = (attach(tiny_model(family)) for family in ("llama", "bart", "gemma4"))
    whole, top = from_text(bart, TEXT, 4), {"decoder.self.2": from_text(llama, TEXT, 4)["decoder.self.2"]}
    for folder, reason in (
        (saved(tmp_path / "a", bart, whole), r"decoder self-attention only.*decoder\.cross, encoder\.self"),
        (saved(tmp_path / "b", llama, top, layers=1), "top layers only"),
        (saved(tmp_path / "c", llama, of_decoder(llama), placement="infix"), "no infix"),
        (saved(tmp_path / "e", gemma, of_decoder(gemma)), "one number and one size of heads"),
    ):
        with pytest.raises(PrefixError, match=reason):
            export_peft(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(PrefixError, match="is there already"):
        export_peft(saved(tmp_path / "d", llama, of_decoder(llama)), tmp_path / "there")


def test_adapters_that_are_not_ours_to_read_are_refused(tmp_path: Path) -> None:
    base = attach(tiny_model("llama"))
    with pytest.raises(PrefixError, match=r"adapter_config\.json: cannot be read"):
        import_peft(tmp_path, base)
    get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(PrefixError, match="type LORA"):
        import_peft(tmp_path / "lora", base)
    other = get_peft_model(tiny_model("gpt2"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    other.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PrefixError, match=r"\[4, 128\] numbers.*has 96 .*another base"):
        import_peft(tmp_path / "gpt2", base)
    (tmp_path / "gpt2" / "adapter_model.safetensors").rename(tmp_path / "gpt2" / "adapter_model.bin")
    with pytest.raises(PrefixError, match="pickled"):
        import_peft(tmp_path / "gpt2", base)
    assert json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


@pytest.fixture(scope="module")
def llama() -> FrozenBase:
    return attach(tiny_model("llama"), max_positions=64)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (torch.tensor(1.0), r"shape \[\], not one row for each virtual token"),
        (torch.zeros(0, 96), r"shape \[0, 96\], not one row"),
        (torch.zeros(96), r"shape \[96\], not one row"),
        (torch.full((4, 96), float("nan")), r"not finite.*train it again"),
        (torch.full((4, 96), float("inf")), r"not finite.*train it again"),
        (torch.zeros(4, 96, dtype=torch.int64), r"torch\.int64"),
        (torch.zeros(3, 96), r"has 3 virtual tokens, adapter_config\.json says 4"),
    ],
)
def test_numbers_that_are_no_prefix_are_refused_with_the_file_and_what_is_wrong(
    tmp_path: Path, llama: FrozenBase, kind: str, table: torch.Tensor, reason: str
) -> None:
    adapter(tmp_path, table, peft_type=kind)
    with pytest.raises(PrefixError, match=rf"adapter_model\.safetensors: .*{reason}"):
        import_peft(tmp_path, llama)


def adapter(folder: Path, table: torch.Tensor, **config: Any) -> None:
    save_file({"prompt_embeddings": table}, folder / "adapter_model.safetensors")
    content = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def test_an_adapter_as_long_as_the_base_has_positions_is_refused(tmp_path: Path, llama: FrozenBase) -> None:
    adapter(tmp_path, torch.zeros(64, 96), num_virtual_tokens=64)
    with pytest.raises(PrefixError, match=r"64 virtual tokens.*llama.*64 positions.*[Tt]rain a shorter"):
        import_peft(tmp_path, llama)
    adapter(tmp_path, torch.zeros(63, 96), num_virtual_tokens=63)
    assert import_peft(tmp_path, llama)["decoder.self.0"][0].shape == (2, 63, 8)


def test_a_projection_whose_parts_do_not_fit_together_is_refused(tmp_path: Path, llama: FrozenBase) -> None:
    adapter(tmp_path, torch.zeros(4, 96))
    parts = {"embedding.weight": (4, 8), "transform.0.weight": (16, 7), "transform.0.bias": (16,), "transform.2.weight": (96, 16)}
    zeros = {name: torch.zeros(shape) for name, shape in (parts | {"transform.2.bias": (96,)}).items()}
    save_file(zeros, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PrefixError, match="projection do not fit together"):
        import_peft(tmp_path, llama)


def test_adapters_of_encoder_decoders_and_of_decoders_are_told_apart(tmp_path: Path, llama: FrozenBase) -> None:
    t5 = attach(tiny_model("t5"))
    theirs = get_peft_model(tiny_model("t5"), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    theirs.save_pretrained(tmp_path)
    # No prefix equals it, and no setting of ours changes that.
    with pytest.raises(PrefixError, match=r"prompt tuning for an encoder-decoder \(t5\).*PrefixTuningConfig") as refused:
        import_peft(tmp_path, t5)
    assert "reparam" not in str(refused.value)
    with pytest.raises(PrefixError, match=r"made for SEQ_2_SEQ_LM, and llama .* is decoder-only"):
        import_peft(tmp_path, llama)
    adapter(tmp_path, torch.zeros(4, 96))
    with pytest.raises(PrefixError, match=r"made for CAUSAL_LM, and t5 .* is an encoder-decoder"):
        import_peft(tmp_path, t5)
