"""The segments of a partition: any stretch comes out as it was, and what is missing or foreign is named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from accrual.archive import Archive, ArchiveKeys, read_stretch
from accrual.blobs import open_store
from accrual.blobs.directory import DirectoryStore
from accrual.engine import StreamEntry
from accrual.errors import ArchiveError
from accrual.stream import START, Archived
from archives import archive_of, archived, write_archive

ENTRIES = [StreamEntry(1000 + 3 * number // 2, number % 2, ((b"e", b"%d" % number),)) for number in range(50)]
KEY = bytes(range(32))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    archive = archive_of(tmp_path)
    write_archive(archive, ENTRIES, 7)
    return archive


def path_of(directory: Path, number: int, partition: str = "p") -> Path:
    return directory / f"events-{partition}" / f"{number:012d}.segment"


def test_any_stretch_comes_out_as_it_was(archive: Archive, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    ids = [START, *(entry[:2] for entry in ENTRIES)]
    for first in range(0, len(ids), 3):
        for last in range(first, len(ids), 4):
            found = list(read_stretch(store, "p", ids[first], ids[last]))
            assert found == ENTRIES[first:last]
        assert list(read_stretch(store, "p", ids[first], None)) == ENTRIES[first:]


def test_a_stretch_may_begin_and_end_between_entries(archive: Archive) -> None:
    middle = ENTRIES[20][:2]
    before = (middle[0], middle[1] + 5)
    assert list(archive.stretch(before, (ENTRIES[30].ms, 99))) == [
        entry for entry in ENTRIES if before < entry[:2] <= (ENTRIES[30].ms, 99)
    ]


def test_only_what_is_needed_is_read(archive: Archive, tmp_path: Path) -> None:
    for number in (1, 2, 8):
        path = path_of(tmp_path, number)
        path.write_bytes(path.read_bytes()[:-10] + bytes(10))
    assert list(archive.stretch(ENTRIES[14][:2], ENTRIES[40][:2])) == ENTRIES[15:41]
    with pytest.raises(ArchiveError, match=r"000000000002.segment: is cut short or damaged"):
        list(archive.stretch(ENTRIES[10][:2], ENTRIES[20][:2]))


def test_what_the_archive_does_not_have_is_refused_before_the_first_entry(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"events-p: ends at 1073-1, before 1074-0"):
        next(archive.stretch(START, (1074, 0)))
    path_of(tmp_path, 1).unlink()
    with pytest.raises(ArchiveError, match=r"events-p: begins behind 1009-0; what came before"):
        next(archive.stretch(START, ENTRIES[20][:2]))
    assert archive.beginning() == ENTRIES[6][:2]
    assert archived(archive) == ENTRIES[7:]
    with pytest.raises(ArchiveError, match="events-q: there is no segment"):
        next(archive_of(tmp_path, "q").stretch(START, None))


def test_a_missing_segment_is_named(archive: Archive, tmp_path: Path) -> None:
    path_of(tmp_path, 3).unlink()
    with pytest.raises(ArchiveError, match="events-p: segment 3 is missing"):
        archived(archive)


def test_a_segment_of_another_archive_is_named(archive: Archive, tmp_path: Path) -> None:
    other = archive_of(tmp_path, "q")
    write_archive(other, ENTRIES, 7)
    shutil.copy(path_of(tmp_path, 3, "q"), path_of(tmp_path, 3))
    with pytest.raises(ArchiveError, match=r"events-p/000000000003.segment: is of partition q"):
        archived(archive)
    again = tmp_path / "again"
    write_archive(archive_of(again), ENTRIES[1:], 7)
    shutil.copy(path_of(again, 3), path_of(tmp_path, 3))
    with pytest.raises(ArchiveError, match=r"000000000003.segment: does not continue segment 2"):
        archived(archive)
    shutil.copy(path_of(tmp_path, 4), path_of(tmp_path, 3))
    with pytest.raises(ArchiveError, match=r"000000000003.segment: is segment 4 under another name"):
        archived(archive)


def test_the_same_entries_in_an_archive_of_its_own_are_foreign_too(archive: Archive, tmp_path: Path) -> None:
    again = archive_of(tmp_path / "again")
    again.append(Archived(), ENTRIES[:7], 2)
    again.append(again.segment(1).standing, ENTRIES[7:14], 2)
    shutil.copy(path_of(tmp_path / "again", 2), path_of(tmp_path, 2))
    with pytest.raises(ArchiveError, match=r"000000000002.segment: does not continue segment 1"):
        archived(archive)


def test_a_count_that_does_not_go_on_is_named(archive: Archive) -> None:
    last = archive.segment(8).standing
    archive.append(Archived(last.segments, last.digest, last.position, last.entries + 1), [StreamEntry(9999, 0, ())], 1)
    with pytest.raises(ArchiveError, match=r"000000000009.segment: counts 51 entries before it, and there were 50"):
        archived(archive)


def test_keys_may_change(tmp_path: Path) -> None:
    standing = Archived()
    for number, keys in enumerate(((), (KEY,), (bytes(32), KEY))):
        archive = archive_of(tmp_path, keys=keys)
        standing = archive.append(standing, [ENTRIES[number]], 1).standing
    assert archived(archive_of(tmp_path, keys=(bytes(32), KEY))) == ENTRIES[:3]
    with pytest.raises(ArchiveError, match=r"000000000002.segment: is encrypted"):
        archived(archive_of(tmp_path, keys=(bytes(32),)))


def test_the_oldest_segments_are_deleted_first(archive: Archive) -> None:
    ends = [archive.header(number).last[0] for number in archive.numbers()]
    assert archive.delete_before(ends[2] + 1, through=8) == 3
    assert list(archive.numbers()) == [4, 5, 6, 7, 8]
    assert archive.delete_before(1 << 50, through=6) == 3
    assert archived(archive) == ENTRIES[42:]
    assert archive.delete_before(1 << 50, through=8) == 2
    assert list(archive.numbers()) == []


def test_other_files_do_not_matter(archive: Archive, tmp_path: Path) -> None:
    for name in ("notes.txt", "000000000009.segment.bak", "9.segment", ".000000000010.segment"):
        (tmp_path / "events-p" / name).write_text("x")
    assert archived(archive) == ENTRIES


def test_partitions_whose_names_begin_alike_keep_apart(tmp_path: Path) -> None:
    for name in ("a", "a-b", "..", "."):
        write_archive(archive_of(tmp_path, name), ENTRIES[: len(name) + 3], 2)
    for name in ("a", "a-b", "..", "."):
        assert archived(archive_of(tmp_path, name)) == ENTRIES[: len(name) + 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events-.", "events-..", "events-a", "events-a-b"]


class Counting(DirectoryStore):
    """A store that counts how often a file is opened."""

    opened = 0

    def read(self, name: str) -> Iterator[bytes]:
        self.opened += 1
        return super().read(name)


def test_to_find_a_stretch_few_segments_are_opened(tmp_path: Path) -> None:
    entries = [StreamEntry(number + 1, 0, ((b"e", b"x"),)) for number in range(400)]
    archive = archive_of(tmp_path, keys=(KEY,))
    write_archive(archive, entries, 1)
    store = Counting(tmp_path)
    found = Archive(store, "p", ArchiveKeys([KEY])).stretch((300, 0), (303, 0))
    assert [entry.ms for entry in found] == [301, 302, 303]
    assert store.opened <= 2 + 10 + 4
