"""Finding the base model, and saying what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.base import resolve_base
from pipeline.errors import BaseModelError


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_a_folder_is_described_by_its_files(tiny_base: Path) -> None:
    info = resolve_base(str(tiny_base))
    assert (info.model_type, info.is_encoder_decoder, info.max_positions, info.revision) == ("llama", False, 64, None)
    assert len(info.digest) == len(info.tokenizer_digest) == 64


def test_digest_follows_the_weights_and_not_the_folders_name(tiny_base: Path, copy: Path) -> None:
    assert resolve_base(str(copy)).digest == resolve_base(str(tiny_base)).digest
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base(str(copy)).digest != resolve_base(str(tiny_base)).digest


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


def test_a_hub_id_offline_is_an_error_at_once() -> None:
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set"):
        resolve_base("some-org/some-model")
