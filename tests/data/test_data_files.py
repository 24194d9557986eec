"""Data in files: what they stand for, and errors that name file, line and byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from shrank.data.data_files import Example, read_examples, read_texts
from tests.common.model_folders import write_image, write_lines, write_sound


def test_paragraphs_of_a_text_file(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne\r\nparagraph.\r\n\r\n\r\n\r\nAnöther one.\r\n".encode())
    assert read_texts(path) == ["One paragraph.", "Anöther one."]
    assert [x.origin for x in read_examples(path)] == [f"{path}, text 1", f"{path}, text 2"]


def test_lines_of_a_jsonl_file(tmp_path) -> None:
    image = write_image(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"text": "One\u2028line.", "label": 3}, {"image": "a.png", "text": None}, {"text": "in", "target": "out"}],
    )
    path.write_text(path.read_text().replace("\\u2028", "\u2028").replace("\n", "\n\n", 1), encoding="utf-8")
    assert read_examples(path) == [
        Example(f"{path}, line 1", text="One\u2028line."),
        Example(f"{path}, line 3", image=image),
        Example(f"{path}, line 4", text="in", target="out"),
    ]


def test_a_folder_joins_what_has_one_name(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    b, a = write_image(tmp_path / "b.png"), write_image(tmp_path / "deep" / "a.JPG")
    sound, spoken = write_sound(tmp_path / "b.wav"), write_sound(tmp_path / "c.flac")
    (tmp_path / "c.txt").write_text("What\nis said.")
    (tmp_path / ".hidden.png").write_text("none")
    (tmp_path / "notes.md").write_text("none")
    assert read_examples(tmp_path) == [
        Example(str(b), image=b, audio=sound),
        Example(str(spoken), text="What is said.", audio=spoken),
        Example(str(a), image=a),
    ]


def test_two_images_of_one_name_are_two_examples(tmp_path) -> None:
    jpg, png = write_image(tmp_path / "a.jpg"), write_image(tmp_path / "a.png")
    assert [x.image for x in read_examples(tmp_path)] == [jpg, png]


def test_one_image_or_sound(tmp_path) -> None:
    image, sound = write_image(tmp_path / "a.png"), write_sound(tmp_path / "b.wav")
    assert [read_examples(x) for x in (image, sound)] == [
        [Example(str(image), image=image)],
        [Example(str(sound), audio=sound)],
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt: is not UTF-8: byte 0xe9 at position 3 \(line 1\)"),
        ("a.txt", b"\xef\xbb\xbfone\n\ncaf\xe9", r"byte 0xe9 at position 11 \(line 3\)"),
        ("a.txt", "text".encode("utf-16"), "byte 0xff at position 0"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl: is not UTF-8: byte 0xe9 at position 13"),
        ("a.txt", b"", r"a\.txt: holds no text"),
        ("a.txt", b"\n \n\n\t\n", r"a\.txt: holds no text"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no text"),
        ("a.jsonl", b'\n{"text": "a"}\n{"text"', r"a\.jsonl, line 3: is no JSON"),
        ("a.jsonl", b"[" * 100000, r"line 1: is no JSON"),
        ("a.jsonl", b'["text"]', "line 1: must be a JSON object, got list"),
        ("a.jsonl", b'{"Text": "a"}', "line 1: has none of text, target, image, audio, but Text"),
        ("a.jsonl", b"{}", "line 1: has none of text, target, image, audio, but nothing"),
        ("a.jsonl", b'{"text": 3}', "line 1: text must be a string that is not empty, got 3"),
        ("a.jsonl", b'{"text": "a", "target": " "}', "line 1: target must be a string that is not empty"),
        ("a.jsonl", b'{"audio": "no.wav"}', r"line 1: audio .*no\.wav: no such file"),
        ("a.json", b'[{"text": "a"}]', r"a\.json: is no \.jsonl file"),
    ],
)
def test_unreadable_files_are_named(name: str, content: bytes, says: str, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_examples(tmp_path / name)


def test_unreadable_folders_are_named(tmp_path) -> None:
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match=r"holds no images .* and no sounds"):
        read_examples(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_examples(tmp_path / "absent")
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.txt: holds no text"):
        read_examples(tmp_path)


def test_texts_of_a_file_without_any(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"image": "a.png"}])
    with pytest.raises(ValueError, match="line 2: has no text"):
        read_texts(path)
