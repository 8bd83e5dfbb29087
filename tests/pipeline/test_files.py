"""Files are there whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.files import read_json, whole_folder, write_json, write_text
from pipeline.keys import CustomerKey


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"a\.txt: the disk is full"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "f"
    with whole_folder(folder) as temporary:
        (temporary / "x").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(StorageError, match="the disk is full"), whole_folder(folder) as temporary:
            (temporary / "x").write_text("new")
    assert (folder / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "f") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "x")


def test_json_of_another_format_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"format": 1, "x": "é"})
    assert read_json(file, 1)["x"] == "é"
    with pytest.raises(StorageError, match=r"format 1.*reads format 2"):
        read_json(file, 2)
    file.write_text('{"format": 1')
    with pytest.raises(StorageError, match="cannot be read"):
        read_json(file, 1)
    with pytest.raises(StorageError, match="no such file"):
        read_json(tmp_path / "none.json", 1)


@pytest.mark.parametrize("bad", ["", "A", "a/b", "..", ".a", "a.b", "-a", "a" * 64, "a\n", "ä"])
def test_hostile_ids_never_become_paths(bad: str) -> None:
    with pytest.raises(ConfigError, match="not valid"):
        CustomerKey(bad)
    with pytest.raises(ConfigError, match="not valid"):
        CustomerKey("a", bad)


def test_key_is_read_as_it_is_written() -> None:
    for key in (CustomerKey("acme"), CustomerKey("acme", "menu")):
        assert CustomerKey.parse(str(key)) == key
    assert CustomerKey("acme", "menu").model_name == "prefixfleet.acme.menu"
