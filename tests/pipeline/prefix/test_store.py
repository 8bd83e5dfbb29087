"""A prefix on disk: what was saved comes back, what was changed is refused."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PrefixError, StorageError
from pipeline.prefix import Site, load_prefix, save_prefix
from pipeline.prefix.initialise import from_prefix
from pipeline.prefix.peft_format import export_peft

PREFIX = {"decoder.self.0": (torch.ones(2, 3, 4), torch.zeros(2, 3, 4))}
BASE: dict[str, Any] = {"id": "some/base", "revision": None, "digest": "b" * 64, "is_encoder_decoder": False}
CONFIG = {"base": BASE, "prefix": {"length": 3, "placement": "prefix"}}


def test_saved_prefix_comes_back(tmp_path: Path) -> None:
    save_prefix(tmp_path / "p", PREFIX, {**CONFIG, "customer": "acme"})
    prefix, config = load_prefix(tmp_path / "p")
    assert config["customer"] == "acme" and config["format"] == 1
    assert torch.equal(prefix["decoder.self.0"][0], PREFIX["decoder.self.0"][0])


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    for customer in ("a", "b"):
        save_prefix(tmp_path / "p", PREFIX, {**CONFIG, "customer": customer})
    assert load_prefix(tmp_path / "p")[1]["customer"] == "b"
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    save_prefix(tmp_path / "p", PREFIX, CONFIG)
    file = tmp_path / "p" / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PrefixError, match="damaged or changed"):
        load_prefix(tmp_path / "p")


def test_a_full_disk_is_said_and_keeps_the_old_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prefix(tmp_path / "p", PREFIX, {**CONFIG, "customer": "old"})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageError, match="the disk is full"):
            save_prefix(tmp_path / "p", PREFIX, {**CONFIG, "customer": "new"})
    assert load_prefix(tmp_path / "p")[1]["customer"] == "old"


def test_missing_or_foreign_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"prefix\.json"):
        load_prefix(tmp_path)
    (tmp_path / "prefix.json").write_text('{"format": 99}')
    with pytest.raises(StorageError, match="format 99"):
        load_prefix(tmp_path)


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"base": None}, r"base\.digest"),
        ({"base": "some/base"}, r"base\.digest"),
        ({"base": {**BASE, "digest": None}}, r"base\.digest"),
        ({"base": {"digest": "b" * 64}}, r"base\.id"),
        ({"base": {**BASE, "is_encoder_decoder": "no"}}, r"base\.is_encoder_decoder"),
        ({"prefix": {"placement": "prefix"}}, r"prefix\.length"),
        # Or an infix would be served as a prefix.
        ({"prefix": []}, r"prefix\.placement"),
        ({"prefix": None}, r"prefix\.placement"),
        ({"prefix": "x"}, r"prefix\.placement"),
        ({"prefix": {"length": 3}}, r"prefix\.placement"),
        ({"prefix": {"length": 3, "placement": "behind"}}, r"prefix\.placement"),
        ({"ensemble": None}, r"ensemble\.average"),
    ],
)
def test_a_config_that_does_not_say_whose_base_it_is_for_is_an_error_that_names_what_is_missing(
    tmp_path: Path, changed: dict[str, Any], missing: str
) -> None:
    folder = tmp_path / "p"
    save_prefix(folder, PREFIX, {**CONFIG, **changed})

    def use() -> None:
        if "prefix" in changed:  # a warm start
            from_prefix(folder, BASE["digest"], {"decoder.self.0": Site(2, 4)}, 3, False)
        elif "digest" in missing or "ensemble" in missing:
            load_prefix(folder)
        else:
            export_peft(folder, tmp_path / "out")

    with pytest.raises(StorageError, match=rf"prefix\.json: has no {missing}, .*train or download it again"):
        use()
