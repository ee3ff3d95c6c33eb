from __future__ import annotations

from pathlib import Path

import pytest

from recsys.errors import FolderLocked, LogFull
from recsys.streams.spool import Spool, Spooled


def drain(spool: Spool, position: int, max_bytes: int = 100) -> list[tuple[str, str, bytes]]:
    found = []
    while position < spool.end:
        chunk, position = spool.read(position, max_bytes)
        found += [(message.topic, message.key, message.value) for message in chunk]
    return found


def test_messages_come_back_in_order_whatever_the_chunk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    spool.append("feedback", [("ü", b"1"), ("", b"")])
    spool.append("impression", [("k", bytes(5000))])
    expected = [("feedback", "ü", b"1"), ("feedback", "", b""), ("impression", "k", bytes(5000))]
    assert drain(spool, 0, 20) == drain(spool, 0, 10**6) == expected
    spool.close()
    spool.close()


def test_acknowledged_messages_are_not_sent_again_after_reopening(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    spool.append("t", [("a", b"1"), ("b", b"2")])
    spool.acknowledge(spool.read(0, 1)[0][0].next)
    spool.close()
    again = Spool(tmp_path, 2**20)
    assert drain(again, again.sent) == [("t", "b", b"2")]
    again.close()


@pytest.mark.parametrize("cut", [1, 8, 20])
def test_torn_tail_is_cut_and_appending_goes_on(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path, 2**20)
    spool.append("t", [("a", b"first")])
    spool.append("t", [("b", b"second")])
    spool.close()
    (file,) = tmp_path.glob("*.spool")
    file.write_bytes(file.read_bytes()[:-cut])
    again = Spool(tmp_path, 2**20)
    assert "torn write" in caplog.text
    again.append("t", [("c", b"third")])
    assert drain(again, 0) == [("t", "a", b"first"), ("t", "c", b"third")]
    again.close()


def test_torn_at_any_page_the_frames_before_it_stay(tmp_path: Path) -> None:
    messages = [(f"key-{n}", bytes([n]) * 700) for n in range(60)]
    spool = Spool(tmp_path / "whole", 2**20)
    spool.append("t", messages)
    spool.close()
    (file,) = (tmp_path / "whole").glob("*.spool")
    whole = file.read_bytes()
    size = len(whole) // len(messages)
    for at in range(0, len(whole), 4096):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / file.name).write_bytes(whole[:at])
        again = Spool(folder, 2**20)
        again.append("t", [("new", b"after")])
        kept = at // size
        assert [(key, value) for _, key, value in drain(again, 0)] == [*messages[:kept], ("new", b"after")], at
        again.close()


def test_tail_lost_behind_the_acknowledged_position_starts_anew(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    spool.append("t", [("a", b"first")])
    spool.acknowledge(spool.end)
    sent = spool.end
    spool.close()
    (file,) = tmp_path.glob("*.spool")
    file.write_bytes(b"")
    again = Spool(tmp_path, 2**20)
    again.append("t", [("b", b"second")])
    assert drain(again, sent) == [("t", "b", b"second")]
    again.close()


def test_full_spool_accepts_nothing_of_the_call_and_goes_on_once_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    spool.append("t", [("a", bytes(500))])
    with pytest.raises(LogFull, match="1000 bytes"):
        spool.append("t", [("b", b"x"), ("c", bytes(500))])
    assert len(drain(spool, 0)) == 1
    spool.acknowledge(spool.end)
    spool.append("t", [("c", bytes(500))])
    assert drain(spool, spool.sent) == [("t", "c", bytes(500))]
    spool.close()


def test_files_that_were_sent_are_deleted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**30)
    for _ in range(40):
        spool.append("t", [("k", bytes(2**20))])
    assert len(list(tmp_path.glob("*.spool"))) == 3
    assert len(drain(spool, 0, 2**20)) == 40
    spool.acknowledge(spool.end)
    assert len(list(tmp_path.glob("*.spool"))) == 1
    spool.append("t", [("z", b"")])
    spool.close()
    again = Spool(tmp_path, 2**30)
    assert drain(again, again.sent) == [("t", "z", b"")]
    again.close()


def test_any_flipped_byte_costs_one_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = [(f"key-{n}", b"value %d" % n) for n in range(6)]
    spool = Spool(tmp_path / "written", 2**20)
    for message in messages:
        spool.append("t", [message])
    spool.close()
    (file,) = (tmp_path / "written").glob("*.spool")
    whole = file.read_bytes()
    size = len(whole) // len(messages)
    for place in range(len(whole)):
        folder = tmp_path / f"flip-{place}"
        folder.mkdir()
        (folder / file.name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        again = Spool(folder, 2**20)
        again.append("t", [("new", b"after")])
        found = [(key, value) for _, key, value in drain(again, 0)]
        assert found == [m for n, m in enumerate(messages) if n != place // size] + [("new", b"after")]
        again.close()
    assert "is damaged at byte" in caplog.text


def test_what_waits_is_told_by_how_long_nothing_moved(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    assert spool.waits_s == 0.0
    spool.append("t", [("a", b"1")])
    spool.append("t", [("b", b"2")])
    assert 0.0 < spool.waits_s < 60.0
    spool.acknowledge(spool.end)
    assert spool.waits_s == 0.0
    kept = spool.set_aside(Spooled("t", "big", b"refused", 0))
    assert kept.exists()
    spool.close()
    Spool(tmp_path, 2**20).close()  # what was set aside is no spool file


def test_second_process_may_not_use_the_folder(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    with pytest.raises(FolderLocked, match="another name"):
        Spool(tmp_path, 2**20)
    spool.close()
    Spool(tmp_path, 2**20).close()
