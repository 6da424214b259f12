"""What is left of a command that was stopped, and which command goes on with it."""

from __future__ import annotations

import pytest

from terramind_jax.scenes import journal

COMMAND = {"seed": 3, "to": ["NDVI"], "overlap": 16}


def test_the_same_command_goes_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), journal.start(tmp_path, COMMAND) as done:
        done.set("a", "NDVI", "tokens", count=2)
        raise KeyboardInterrupt
    assert f"Stopped. What is done stays in {tmp_path}/unfinished; the same command goes on from there." in capsys.readouterr().out
    with journal.start(tmp_path, COMMAND) as done:
        assert done.get("a", "NDVI", "tokens") == 2 and done.get("b") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [({"seed": 4}, "its seed was 3, now it is 4"), ({"steps": 2}, "its steps was null, now it is 2")],
)
def test_another_command_names_what_differs(tmp_path, change, message):
    journal.start(tmp_path, COMMAND)
    with pytest.raises(FileExistsError, match=f"unfinished holds the work of another command: {message}; repeat that one"):
        journal.start(tmp_path, COMMAND | change)


def test_files_name_their_own_scene_of_a_command(tmp_path):
    with journal.start(tmp_path, COMMAND | {"scenes": ["a", "b"]}) as done:
        assert done.tags("b") == {f"terramind_jax_{name}": x for name, x in dict(seed="3", to='["NDVI"]', overlap="16", scene="b").items()}


def test_an_error_before_anything_is_done_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), journal.start(tmp_path, COMMAND):
        raise ValueError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError), journal.start(tmp_path, COMMAND) as done:
        done.finish("a")
        raise ValueError
    assert journal.start(tmp_path, COMMAND).get("a") == 1


@pytest.mark.parametrize("inner", [".", "inner"])
def test_a_file_in_the_place_of_the_folder_is_told(tmp_path, inner):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="^.*/out is a file; expected a folder.$"):
        journal.check_outputs(tmp_path / "out" / inner, [tmp_path / "out" / inner / "a.tif"])
    journal.check_outputs(tmp_path / "new" / inner, [tmp_path / "new" / inner / "a.tif"])


def test_outputs_may_be_there_only_if_a_stopped_command_made_them(tmp_path):
    (tmp_path / "a.tif").touch()
    with pytest.raises(FileExistsError, match=r"a\.tif exists already"):
        journal.check_outputs(tmp_path, [tmp_path / "a.tif"])
    journal.start(tmp_path, COMMAND)
    journal.check_outputs(tmp_path, [tmp_path / "a.tif"])
