"""replacing: the old content or the new one, never half of it."""

from __future__ import annotations

import os
import stat

import pytest

from shrank.util.files import is_empty_or_absent, replacing, size_on_disk


def test_a_file_appears_whole_with_the_usual_mode(tmp_path) -> None:
    target = tmp_path / "new" / "x.bin"
    with replacing(target) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(b"12345")
        assert not target.exists()
    (tmp_path / "probe").touch()
    assert target.read_bytes() == b"12345"
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    assert os.listdir(target.parent) == ["x.bin"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failure_leaves_what_was_there(error: type, tmp_path) -> None:
    target = tmp_path / "x.bin"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x.bin"]


def test_sizes_and_emptiness(tmp_path) -> None:
    assert is_empty_or_absent(tmp_path) and is_empty_or_absent(tmp_path / "none")
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"12")
    assert size_on_disk(tmp_path) == 5 and size_on_disk(tmp_path / "a") == 3
    assert not is_empty_or_absent(tmp_path) and not is_empty_or_absent(tmp_path / "a")
