"""A dask cluster as an executor, for those who prewarm more than one machine can."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from .errors import ConfigError

__all__ = ["DaskExecutor"]


class DaskExecutor(Executor):
    """Submits to a dask scheduler, each kernel under its own key, so that no scheduler runs one
    twice at the same time, whoever asks for it."""

    def __init__(self, address: str, timeout: float = 30.0) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise ConfigError(
                "executor: dask is not installed; pip install 'ssmgen[dask]'"
            ) from None
        try:
            self.client = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"executor: no scheduler answers at {address}: {error}") from None

    @property
    def _max_workers(self) -> int:
        return sum(self.client.nthreads().values())

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        (task,) = args
        future: Future[Any] = Future()
        remote = self.client.submit(fn, task, key=f"ssmgen-{task['key']}-{task['toolchain']}")

        def deliver(done: Any) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(done.result())
            except BaseException as error:
                future.set_exception(error)

        remote.add_done_callback(deliver)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.client.close()
