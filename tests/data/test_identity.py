"""Whether data are the same as before: a hash of names and sizes, and of the texts that are read."""

from __future__ import annotations

from pathlib import Path

from sd_recipes.data.identity import data_fingerprint
from sd_recipes.recipe import Recipe


def fingerprint(folder: Path) -> str:
    return data_fingerprint(Recipe(train_data_dir=str(folder), pretrained_model_name_or_path="any"))


def build(folder: Path) -> Path:
    (folder / "b").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"12345")
    (folder / "b" / "c.jpg").write_bytes(b"1234567")
    (folder / "b" / "c.txt").write_text("a boat")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a ship\n")
    (folder / "broken.png").symlink_to(folder / "gone")
    return folder


def test_a_folders_fingerprint_is_that_of_earlier_versions_wherever_it_lies(tmp_path: Path) -> None:
    """Checkpoints have it: another one would make every resumed run say that its data had changed."""
    assert fingerprint(build(tmp_path / "here")) == "1505e09a54b9f098"
    assert fingerprint(build(tmp_path / "there")) == "1505e09a54b9f098"


def test_another_name_size_or_text_is_another_fingerprint(tmp_path: Path) -> None:
    folder = build(tmp_path / "data")
    found = {fingerprint(folder)}
    (folder / "a.png").write_bytes(b"123456")
    found.add(fingerprint(folder))
    (folder / "b" / "c.txt").write_text("a raft")
    found.add(fingerprint(folder))
    (folder / "a.png").rename(folder / "d.png")
    found.add(fingerprint(folder))
    assert len(found) == 4
