"""Which files a folder or a list names, and their order."""

import os

import pytest

from meloformer.data.inputs import find_files, hash_of_names, in_order
from meloformer.errors import UserError


def test_folder_is_searched_through_and_sorted(tmp_path):
    names = ["b.mid", "A.MIDI", "deep/er/c.Kar", "deep/d.rmi", "caf\udce9.mid"]
    for name in [*names, "notes.txt", "mid", "x.mid.bak"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_files(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)


def test_links_to_folders_are_followed_once(tmp_path):
    """A link out, one to a brother, one to itself, one to its parent, one to nothing."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for path in (outside / "a.mid", folder / "deep" / "b.mid"):
        path.parent.mkdir(parents=True)
        path.touch()
    links = {"z out": outside, "z twice": folder / "deep", "self": folder / "self", "none": tmp_path / "none"}
    for name, target in {**links, "deep/up": folder}.items():
        (folder / name).symlink_to(target)
    assert find_files(str(folder)) == [str(folder / "deep" / "b.mid"), str(folder / "z out" / "a.mid")]


def test_lines_of_a_list_are_literal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["# 1.mid", " padded .mid", "caf\udce9.mid", "twice.mid", "twice.mid"]
    (tmp_path / "list.txt").write_bytes(b"\n".join(map(os.fsencode, names)))
    assert find_files("list.txt") == names


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa.mid\r\n\r\n  \r\nb.mid\r\n")
    assert find_files(str(path)) == ["a.mid", "b.mid"]


def test_here_comes_before_beside_the_list(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("lists/both.mid", "here/both.mid", "lists/beside.mid"):
        (tmp_path / name).touch()
    path = tmp_path / "lists" / "list.txt"
    path.write_text("both.mid\nbeside.mid\nnowhere.mid\n")
    monkeypatch.chdir(tmp_path / "here")
    assert find_files(str(path)) == ["both.mid", str(tmp_path / "lists" / "beside.mid"), "nowhere.mid"]


BAD = {
    "missing": ("nowhere", "No such file"),
    "folder without MIDI": ("none", "holds no MIDI files"),
    "empty list": ("empty.txt", "the list is empty"),
    "a MIDI file": ("song.mid", "not a text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_to_read_is_told(case, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "song.mid").write_bytes(b"MThd\0\0\0\6\0\1")
    name, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        find_files(str(tmp_path / name))
    assert name in str(caught.value)


def test_order_is_a_permutation_fixed_by_the_seed():
    files = [f"{i}.mid" for i in range(50)]
    order = in_order(files, 5, None)
    assert sorted(order) == sorted(files)
    assert order != files
    assert order == in_order(files, 5, None) != in_order(files, 6, None)
    assert in_order(files, 5, 7) == order[:7]
    assert in_order(files, 5, 500) == order


def test_hash_tells_names_and_order_apart():
    lists = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a", "b", "c"]]
    assert len({hash_of_names(names) for names in lists}) == len(lists)


def test_hash_is_of_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    here = hash_of_names(["a.mid"])
    assert here == hash_of_names([str(tmp_path / "a.mid")])
    monkeypatch.chdir(tmp_path / "other")
    assert here == hash_of_names(["../a.mid"]) != hash_of_names(["a.mid"])
