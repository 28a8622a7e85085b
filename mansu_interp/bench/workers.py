"""Doing one thing for many items: in this process, or on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from ..errors import ConfigError, MansuError
from ..utils.libraries import library

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Engine(Protocol):
    """Does one thing for many items."""

    def __call__(self, do: Callable[[T], R], items: Sequence[T], /) -> Iterable[R]:
        """What ``do`` returns for each item, in the order in which they finish."""
        ...


def _unreachable(scheduler: str | None, why: object) -> ConfigError:
    return ConfigError(
        f"No Dask scheduler answers at {scheduler!r} ({why}). Expected an address such as "
        "tcp://host:8786, or the scheduler file of a running one."
    )


@contextlib.contextmanager
def engine(jobs: int = 1, scheduler: str | None = None) -> Iterator[Engine]:
    """Where a sweep is computed.

    Arguments:
        jobs: processes on this machine, each with one thread, that end when this one does; 1: this
            process itself, one item after the other.
        scheduler: a running Dask cluster instead: its address, or the path of its scheduler file.

    Raises:
        ConfigError: Dask is not installed, no scheduler answers, or its workers have threads.
        MansuError: workers died over an item (while the engine's results are read).
    """
    if scheduler is None and jobs == 1:
        yield map
        return
    if scheduler and "://" not in scheduler and not Path(scheduler).exists():
        raise _unreachable(scheduler, "no such file")  # Dask would wait for it for ever
    dask = library("distributed", "sweep", "Working side by side")
    with contextlib.ExitStack() as opened:
        if scheduler is None:
            where: dict[str, object] = {
                "address": opened.enter_context(
                    dask.LocalCluster(
                        n_workers=jobs,
                        threads_per_worker=1,
                        memory_limit=0,
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                    )
                )
            }
        else:
            where = {"address" if "://" in scheduler else "scheduler_file": scheduler}
        try:
            client = opened.enter_context(dask.Client(**where))
        except (OSError, ValueError) as error:
            raise _unreachable(scheduler, error) from error
        if any(threads > 1 for threads in client.nthreads().values()):
            raise ConfigError(
                "A Dask worker has several threads, but seeds belong to a whole process. Start the "
                "workers with --nthreads 1."
            )

        def finished(do: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
            try:
                for future in dask.as_completed(client.map(do, items, pure=False)):
                    yield future.result()
            except dask.KilledWorker as error:
                raise MansuError(
                    f"Workers died several times over one piece of work, out of memory perhaps "
                    f"({error}). What is finished is kept: start again with fewer at a time."
                ) from error

        yield finished
