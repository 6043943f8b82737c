import errno
import os
from pathlib import Path

import pytest

from kvplan.errors import KVPlanError
from kvplan.files import check_writable, read_text, sole_writer, write_text
from tests.rooms import room


def test_text_survives_writing_and_reading(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "señal\n")
    assert read_text(tmp_path / "a.txt", "note") == "señal\n"


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "a.txt", text)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KVPlanError, match=r"a\.txt: cannot write \(No space left on device\); nothing was changed"):
        write_text(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_disk_that_is_really_full_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with room(4096), pytest.raises(KVPlanError, match=r"a\.txt: cannot write \(File too large\); nothing was changed"):
        write_text(tmp_path / "a.txt", "new" * 4096)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    full = Path("/dev/full")
    check_writable(full)
    with pytest.raises(KVPlanError, match=r"^/dev/full: cannot write \(No space left on device\)$"):
        write_text(full, "text")
    assert full.is_char_device()
    write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(KVPlanError, match="/dev/full: not a file"), sole_writer(full, "a"):
        pass


def test_a_pipe_gets_everything(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    text = "line\n" * 2000
    path = Path(f"/proc/self/fd/{writer}")
    if not path.exists():
        pytest.skip("no /proc")
    check_writable(path)
    write_text(path, text)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        assert file.read() == text


def test_a_missing_folder_is_reported_before_and_at_the_write(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(KVPlanError, match="cannot write there"):
        check_writable(path)
    with pytest.raises(KVPlanError, match="cannot write"):
        write_text(path, "text")


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KVPlanError, match=r"gone\.yaml: cannot read the policy \(No such file or directory\)"):
        read_text(tmp_path / "gone.yaml", "policy")


def test_binary_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KVPlanError, match="not a policy"):
        read_text(tmp_path / "a.yaml", "policy")


def test_a_folder_or_an_input_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("{}")
    with pytest.raises(KVPlanError, match="a folder; name a file"):
        check_writable(tmp_path)
    with pytest.raises(KVPlanError, match=r"in\.json: this command reads that file; name another one to write"):
        check_writable(tmp_path / "in.json", [None, "other", tmp_path / "x" / ".." / "in.json"])


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(tmp_path / "a.txt", "note") == "one"


def test_another_writer_is_refused_and_an_equal_one_shares(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with sole_writer(path, "a.journal"):
        with sole_writer(path, "a.journal"):
            pass
        with pytest.raises(
            KVPlanError, match=r"policy.yaml: another search \(a.journal\) is writing it; give another -o"
        ):
            with sole_writer(path, "b.journal"):
                pass
    with sole_writer(path, "b.journal"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_writer_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".policy.yaml.lock").write_text("dead.journal")
    with sole_writer(tmp_path / "policy.yaml", "b.journal"):
        assert (tmp_path / ".policy.yaml.lock").read_text() == "b.journal"
