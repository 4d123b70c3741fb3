"""Temporary folders of the cache, while others sweep it."""

import threading
from pathlib import Path

from vmkit.image.cache import open_cache


def test_sweep_of_another_takes_no_folder_that_is_being_made(tmp_path: Path) -> None:
    is_over = threading.Event()

    def sweep() -> None:
        with open_cache(tmp_path / "cache") as cache:
            while not is_over.is_set():
                cache.sweep()

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        with open_cache(tmp_path / "cache") as cache:
            for _ in range(1000):
                with cache.temporary_dir() as folder:
                    (folder / "file").write_bytes(b"")
    finally:
        is_over.set()
        for thread in sweepers:
            thread.join()
