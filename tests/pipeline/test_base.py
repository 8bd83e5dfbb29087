"""Finding the base model, and saying what is wrong with it."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import hub
from pipeline.base import resolve_base
from pipeline.errors import BaseModelError


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_a_folder_is_described_by_its_files(tiny_base: Path) -> None:
    info = resolve_base(str(tiny_base))
    assert (info.model_type, info.is_encoder_decoder, info.max_positions, info.revision) == ("llama", False, 64, None)
    assert len(info.digest) == len(info.tokenizer_digest) == 64


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 20}, 20),  # the first files of Phi-3 with 128k
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 24}}, 24),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 64),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16}}, 64),  # turns all lengths alike
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 30}}}, 30),
    ],
)
def test_a_base_that_turns_positions_by_the_longest_row_has_as_many_as_leave_the_others_alone(
    copy: Path, changed: dict[str, Any], expected: int
) -> None:
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_parameters", None)
    file.write_text(json.dumps(config | changed))
    assert resolve_base(str(copy)).max_positions == expected


def test_digest_follows_the_weights_and_not_the_folders_name(tiny_base: Path, copy: Path) -> None:
    assert resolve_base(str(copy)).digest == resolve_base(str(tiny_base)).digest
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base(str(copy)).digest != resolve_base(str(tiny_base)).digest


def _change(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"rms_norm_eps": 0.5}),
        ("config.json", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
        ("generation_config.json", {"eos_token_id": [0, 2]}),
    ],
)
def test_digest_follows_the_settings_that_change_the_outputs(
    tiny_base: Path, copy: Path, name: str, changes: dict[str, Any]
) -> None:
    _change(copy / name, lambda content: content.update(changes))
    assert resolve_base(str(copy)).digest != resolve_base(str(tiny_base)).digest


def test_digest_is_the_same_whichever_library_saved_the_base(tiny_base: Path, copy: Path) -> None:
    notes = {"transformers_version": "1", "_name_or_path": "x", "dtype": "float16", "torch_dtype": "float16", "use_cache": False}
    _change(copy / "config.json", lambda content: content.update(notes))
    _change(copy / "generation_config.json", lambda content: content.update(transformers_version="1", temperature=0.5))
    assert resolve_base(str(copy)).digest == resolve_base(str(tiny_base)).digest


def test_damaged_generation_config_is_named(copy: Path) -> None:
    (copy / "generation_config.json").write_text("[1]")
    with pytest.raises(BaseModelError, match=r"generation_config\.json cannot be read"):
        resolve_base(str(copy))


def test_remembered_digest_is_not_trusted_once_the_file_changed(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    first = resolve_base(str(copy), digests=cache).digest
    assert resolve_base(str(copy), digests=cache).digest == first
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert resolve_base(str(copy), digests=cache).digest != first
    cache.write_text("damaged")
    resolve_base(str(copy), digests=cache)


def test_what_is_missing_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        resolve_base(str(tmp_path / "none"))
    (copy / "tokenizer.json").rename(copy / "x")
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(BaseModelError, match="no tokenizer"):
        resolve_base(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"no \.safetensors weights"):
        resolve_base(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        resolve_base(str(copy))


def test_a_model_that_generates_nothing_is_refused_by_name(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(BaseModelError, match="BertForMaskedLM is neither a causal language model"):
        resolve_base(str(copy))


def test_a_model_that_also_sees_is_refused_as_such_and_not_as_what_it_is_called(copy: Path) -> None:
    """Gemma 3's architecture of text and images ends as those of encoder-decoders do."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForConditionalGeneration"]}))
    with pytest.raises(
        BaseModelError, match=r"Gemma3ForConditionalGeneration is no encoder-decoder.*images.*text-only.*ForCausalLM"
    ):
        resolve_base(str(copy))


def test_a_hub_id_offline_is_an_error_at_once() -> None:
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set"):
        resolve_base("some-org/some-model")


def test_a_hub_that_takes_connections_and_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(BaseModelError, match=r"no such folder beside the fleet file.*127.0.0.1:.* does not answer"):
            resolve_base("some-org/mistyped")
        assert time.monotonic() - start < 5
        silent.settimeout(0.1)
        silent.accept()[0].close()  # it was asked
