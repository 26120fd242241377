"""A short soak in every run of the tests, the full one in the slow ones; see soak.py."""

import mmap
import threading

import psutil
import pytest

from faults.soak import Watch, soak, what_grew


@pytest.mark.parametrize("length", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_grows(tmp_path, length):
    rows = soak(length, length, tmp_path, together=length < 10_000)
    assert what_grew(rows) == []
    assert [len(row["readings"]) for row in rows] == [100] * 4
    assert len(list((tmp_path / "autoencoder" / "samples").iterdir())) == 20  # saved, drawn and logged all the while
    assert rows[0]["handles"] > rows[1]["handles"]  # of the worker that reads data


def test_a_leak_of_each_kind_is_seen(tmp_path):
    """Of memory a tenth of what the process has, in fresh pages: a worker that ran other tests has much of its own."""
    leaked, watch, stop = [], Watch(100), threading.Event()
    size = max(2**20, psutil.Process().memory_info().rss // 900)
    for step in range(1, 101):
        thread = threading.Thread(target=stop.wait)
        pages = mmap.mmap(-1, size)
        pages.write(b"1" * size)
        leaked.append((pages, open(tmp_path / f"{step}", "w"), thread))
        thread.start()
        watch(step)
    stop.set()
    for pages, file, thread in leaked:
        pages.close()
        file.close()
        thread.join()
    memory, handles, threads = what_grew([{"part": "a loop", **watch.summary()}])
    assert memory.startswith("a loop: memory grew by")
    assert (handles.split()[2], threads.split()[2]) == ("handles", "threads")
