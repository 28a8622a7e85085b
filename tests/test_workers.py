"""Where a sweep is computed: here, on workers of our own, on a running cluster, or nowhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from mansu_interp.bench.config import BenchConfig
from mansu_interp.bench.run import run_bench
from mansu_interp.bench.workers import engine
from mansu_interp.errors import ConfigError, MansuError


def work(item: int) -> tuple[int, int]:
    """An item, squared, and who did it."""
    if item < 0:
        raise MansuError(f"{item} is negative")
    if item == 0:
        os._exit(1)
    return item * item, os.getpid()


def squares(found: list[tuple[int, int]]) -> list[int]:
    return sorted(square for square, _ in found)


def test_one_process_does_all_itself():
    with engine() as compute:
        assert list(compute(work, [3, 1])) == [(9, os.getpid()), (1, os.getpid())]


def test_workers_of_our_own_and_what_they_raise():
    with engine(2) as compute:
        found = list(compute(work, [1, 2, 3, 4]))
        assert squares(found) == [1, 4, 9, 16]
        assert os.getpid() not in {pid for _, pid in found}
        with pytest.raises(MansuError, match="-1 is negative"):
            list(compute(work, [-1]))
        with pytest.raises(MansuError, match=r"Workers died.*What is finished is kept"):
            list(compute(work, [0]))


def test_a_running_cluster_by_address_or_file(tmp_path: Path):
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        file = tmp_path / "scheduler.json"
        file.write_text(f'{{"address": "{cluster.scheduler_address}"}}')
        for scheduler in (cluster.scheduler_address, str(file)):
            with engine(scheduler=scheduler) as compute:
                assert squares(list(compute(work, [2, 3]))) == [4, 9]


def test_workers_with_threads_are_refused():
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        pytest.raises(ConfigError, match="Start the workers with --nthreads 1"),
        engine(scheduler=cluster.scheduler_address),
    ):
        pass


@pytest.mark.parametrize("scheduler", ["nonsense://x", "no-such-file.json"])
def test_no_scheduler_there(scheduler: str):
    with (
        pytest.raises(ConfigError, match=f"No Dask scheduler answers at '{scheduler}'"),
        engine(scheduler=scheduler),
    ):
        pass


def test_without_dask_one_process_works_and_more_name_the_install_line(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with engine() as compute:
        assert squares(list(compute(work, [2]))) == [4]
    with (
        pytest.raises(
            ConfigError, match=r'Working side by side needs.*pip install "mansu-interp\[sweep\]"'
        ),
        engine(2),
    ):
        pass


def test_bench_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it once, with --jobs"):
        run_bench(BenchConfig(out=tmp_path))


def test_a_table_needs_no_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    config: dict[str, Any] = {"methods": ("ga",), "out": tmp_path, "jobs": 2}
    assert run_bench(BenchConfig(table_only=True, **config)) == []
