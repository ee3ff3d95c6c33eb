from __future__ import annotations

from pathlib import Path

import pytest

from recsys.errors import FolderLocked, LogError, LogFull
from recsys.streams.spool import Spool


def drain(spool: Spool, position: int, max_bytes: int = 100) -> list[tuple[str, str, bytes]]:
    found = []
    while chunk := spool.read(position, max_bytes) if position < spool.end else []:
        found += [(message.topic, message.key, message.value) for message in chunk]
        position = chunk[-1].next
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
    spool.acknowledge(spool.read(0, 1)[0].next)
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


def test_flipped_byte_before_the_tail_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    spool.append("t", [("a", b"first")])
    (file,) = tmp_path.glob("*.spool")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(LogError, match=r"\.spool.*damaged at byte 0"):
        spool.read(0, 1000)
    spool.close()


def test_second_process_may_not_use_the_folder(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2**20)
    with pytest.raises(FolderLocked, match="another name"):
        Spool(tmp_path, 2**20)
    spool.close()
    Spool(tmp_path, 2**20).close()
