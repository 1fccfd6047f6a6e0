"""Names the image whose reading takes long: a run on a file system that stalls would otherwise only stand still."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

SECONDS = 30.0  # until it is named, and twice as long before it is named again

_since: dict[int, tuple[str, float]] = {}  # by thread, what it reads and since when
_watcher: threading.Thread | None = None  # behind a fork it lives no more


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Around the reading of a file. A thread of the process looks on; it costs about a microsecond."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _since.clear()
        _watcher = threading.Thread(target=_watch, name="slow reads", daemon=True)
        _watcher.start()
    thread = threading.get_ident()
    _since[thread] = name, time.monotonic()
    try:
        yield
    finally:
        _since.pop(thread, None)


def _watch() -> None:
    due: dict[tuple[int, float], float] = {}  # seconds after which a read is named next
    while True:
        time.sleep(SECONDS / 10)
        if _watcher is not threading.current_thread():  # another one looks on
            return
        now, reads = time.monotonic(), dict(_since)
        due = {(thread, since): due.get((thread, since), SECONDS) for thread, (_, since) in reads.items()}
        for thread, (name, since) in reads.items():
            if now - since >= due[thread, since]:
                due[thread, since] *= 2
                log.warning("%s has been read for %.0f s: its file system stalls, or it is huge; what needs it waits", name, now - since)
