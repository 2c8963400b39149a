"""The true counts of pictures are found in counts.csv, or in the names of the pictures."""

from pathlib import Path

import pytest
from helpers import assert_refused

from air.data.user_images.true_counts import PictureCounts

FILES = ["a.png", "b 2.png", "sub/a.png", "sub/c.png", "stack.tif"]


def counts(folder: Path, pattern: str | None = None) -> list[int | None]:
    """The counts of all files; the stack has two pages."""
    paths = [folder / name for name in FILES]
    known = PictureCounts(folder, paths, pattern)
    found = [known.of(str(path), path) for path in paths[:-1]]
    return found + [known.of(f"{paths[-1]}[{page}]", paths[-1]) for page in (0, 1)]


def refused(folder: Path, problem: str, pattern: str | None = None) -> None:
    assert_refused(folder, problem, lambda: counts(folder, pattern))


PAGES = "stack.tif[0],4\nstack.tif[1],5\n"


@pytest.mark.parametrize(
    "text",
    [
        f"a.png,0\nb 2.png,1\nsub/a.png,2\nsub/c.png,3\n{PAGES}",
        f"name,count\na.png,0\nb 2.png,1\nsub/a.png,2\nsub/c.png,3\n{PAGES}",
        f"\ufeffname,count\r\na.png,0\r\nb 2.png,1\r\nsub/a.png,2\r\nsub/c.png,3\r\n{PAGES}",
        f"file , n \n a.png , 0\n\n'x.png',7\n\"b 2.png\", 01 \nsub/a.png,2\nc.png,3\n,\n{PAGES}",
        f".\\a.png,0\nb 2.png,1\nsub\\a.png,2\n./sub/c.png,3\na.png,0\n{PAGES}",
        "a.png,0\nb 2.png,1\nsub/a.png,2\nc.png,3\nstack.tif,4\nstack.tif[1],5",
    ],
    ids=["plain", "header", "Excel", "spaces", "Windows", "all pages"],
)
def test_a_csv_file_names_each_picture(text: str, tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_text(text, encoding="utf-8", newline="")
    assert counts(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_without_a_csv_file_counts_are_unknown(tmp_path: Path) -> None:
    assert counts(tmp_path) == [None] * 6
    (tmp_path / "counts.csv").mkdir()
    assert counts(tmp_path) == [None] * 6


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "counts.csv: no count of a.png; expected a line a.png,count"),
        (b"a.png,0\nb 2.png,1\nsub/c.png,3", "no count of sub/a.png"),  # it has a namesake
        (b"a.png,-1", "line 1: expected name,count, got a.png,-1"),
        (b"a.png,", "line 1: expected name,count, got a.png,"),
        (b"name,count\na.png;1", "line 2: expected name,count, got a.png;1"),
        (b'name,count\n"a\n.png",x', r"line 2: expected name,count, got a \.png,x"),
        (b"a.png," + b"9" * 5000, "line 1: expected name,count, got a.png,9"),
        (b"a.png,1\na.png,2", "line 2: a.png has two counts, 1 and 2"),
        ("a.png,1".encode("utf-16"), "counts.csv: cannot be read: "),
        (b"a.png,\xff", "counts.csv: cannot be read: "),
        (b'"' + bytes(200_000), "counts.csv: cannot be read: "),
    ],
    ids=lambda given: str(given)[:20],
)
def test_a_csv_file_with_faults_is_named(text: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_bytes(text)
    refused(tmp_path, problem)


def test_a_pattern_finds_counts_in_names_pages_and_folders(tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_text("nonsense")
    names = ["3-objects.png", "sub/07-objects_2.png", "12/a.png", "s.tif[4]"]
    patterns = [r"(\d+)-objects", r"(\d+)-objects", r"^(\d+)/", r"\[(\d+)\]"]
    for name, pattern, expected in zip(names, patterns, [3, 7, 12, 4], strict=True):
        file = tmp_path / name.removesuffix("[4]")
        known = PictureCounts(tmp_path, [file], pattern)
        assert known.of(str(tmp_path / name), file) == expected
    stack = tmp_path / "3 of.tif"
    assert PictureCounts(stack, [stack], r"(\d) of").of(f"{stack}[1]", stack) == 3


@pytest.mark.parametrize("pattern", [r"b (\d)", "(a)", r"(\d)?", r"(x)|a"])
def test_a_name_in_which_a_pattern_finds_no_count_is_told(pattern: str, tmp_path: Path) -> None:
    refused(tmp_path, "a.png: --count-pattern matches no count in the name a.png", pattern)
