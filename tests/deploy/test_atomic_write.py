"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import os

import pytest

from lightning_autoprune.deploy.atomic_write import atomic_write


def test_a_file_is_replaced_once_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))  # as some libraries write theirs
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_missing_folder_raises_an_error_with_the_path_as_given(tmp_path):
    path = tmp_path / "none" / "a"
    with pytest.raises(FileNotFoundError) as error, atomic_write(path):
        pass
    assert error.value.filename == str(path)


def test_a_link_stays_and_the_file_that_it_points_to_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_folders_and_pipes_are_left_alone(make, tmp_path):
    path = tmp_path / "a"
    make(path)
    before = path.stat().st_mode
    with pytest.raises(OSError, match="not a regular file") as error, atomic_write(path):
        pass
    assert error.value.filename == str(path)
    assert path.stat().st_mode == before


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with atomic_write(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "a") as second:
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_a_file_keeps_its_mode_and_the_temporary_file_has_it_too(mode, tmp_path):
    path = tmp_path / "a"
    path.touch()
    path.chmod(mode)
    with atomic_write(path) as temporary:
        assert temporary.stat().st_mode & 0o777 == mode | 0o200
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_text() == "new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
