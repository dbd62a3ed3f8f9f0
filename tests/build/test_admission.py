"""Jobs run side by side only while they fit together, and one that never fits runs alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgegen.build.admission import Admission


class Watch:
    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.lock = threading.Lock()
        self.running: list[int] = []
        self.seen: list[tuple[int, ...]] = []

    def job(self, needed: int) -> None:
        with self.admission.room_for(needed):
            with self.lock:
                self.running.append(needed)
                self.seen.append(tuple(self.running))
            time.sleep(0.02)
            with self.lock:
                self.running.remove(needed)


@pytest.mark.parametrize("budget, most", [(10, 10), (4, 4), (None, 24)])
def test_what_runs_at_once_fits(budget: int | None, most: int) -> None:
    watch = Watch(Admission(budget))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(watch.job, [4] * 6))
    assert max(sum(running) for running in watch.seen) <= most
    assert len(watch.seen) == 6


def test_what_is_larger_than_everything_runs_alone() -> None:
    watch = Watch(Admission(5))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(watch.job, [2, 9, 2, 9]))
    assert all(running == (9,) or 9 not in running for running in watch.seen)
    assert sorted(running[-1] for running in watch.seen) == [2, 2, 9, 9]


def test_a_job_that_fails_gives_its_room_back() -> None:
    admission = Admission(1)
    with pytest.raises(ValueError), admission.room_for(1):
        raise ValueError
    with admission.room_for(1):
        pass
