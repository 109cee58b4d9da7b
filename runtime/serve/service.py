"""The engine's life in a server: loading beside the first requests, ready, draining, gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ...errors import LatentRTError, ServiceError
from .engine import AsyncEngine, submit_to

__all__ = ["NotReadyError", "Service"]

_log = logging.getLogger(__name__)


class NotReadyError(ServiceError):
    """The model is not loaded yet, or does not load."""


class Service:
    """One model behind a server.

    Attributes:
        model: its public name.
        created: when, in seconds since 1970.
    """

    def __init__(
        self,
        model: str,
        make_engine: Callable[[], AsyncEngine],
        *,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """`make_engine` may take its time: it is called in a thread. `on_ready` is called in the event loop's, once
        all is loaded and warm."""
        self.model = model
        self.created = int(time.time())
        self._make_engine = make_engine
        self._on_ready = on_ready
        self._engine: AsyncEngine | None = None
        self._made: Future[AsyncEngine] | None = None  # warm or not
        self._loading: asyncio.Task[None] | None = None
        self._reason: str | None = "the model is being loaded"

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            NotReadyError: with the reason.
        """
        if self._engine is None:
            raise NotReadyError(f"not ready: {self._reason}")
        return self._engine

    @property
    def reason(self) -> str | None:
        """Why it takes no requests; None when it does."""
        if self._engine is None:
            return self._reason
        if self._engine.failure is not None:
            return str(self._engine.failure)
        return "it is shutting down" if self._engine.draining else None

    @property
    def stopped(self) -> bool:
        """Whether a fault has ended it for good, so that only a new process can serve."""
        return self._engine is not None and self._engine.failure is not None

    @property
    def waiting(self) -> int:
        return 0 if self._engine is None else self._engine.waiting

    @property
    def running(self) -> int:
        return 0 if self._engine is None else self._engine.running

    @property
    def at_work(self) -> bool:
        """Whether a thread still loads the model, or makes something, be it for nobody."""
        if self._made is None or self._made.cancelled():
            return False
        return not self._made.done() or (self._made.exception() is None and self._made.result().at_work)

    def begin(self) -> None:
        """Load in the background."""
        self._loading = asyncio.get_running_loop().create_task(self._load(), name="latentrt-load")

    async def loaded(self) -> None:
        """Wait until loading has ended, well or not."""
        if self._loading is not None:
            await asyncio.wait([self._loading])

    async def drain(self, timeout: float | None) -> None:
        """Finish what was taken, for at most `timeout` seconds. A model that is still loading is left to itself."""
        if self._engine is not None:
            await self._engine.drain(timeout)
        elif self._loading is not None:
            self._reason = "it is shutting down"
            self._loading.cancel()

    async def _load(self) -> None:
        begun = time.perf_counter()
        # Not one of the loop's threads: for those it waits when it ends.
        thread = ThreadPoolExecutor(1, "latentrt-load")
        try:
            self._made = submit_to(thread, self._make_engine)
            engine = await asyncio.wrap_future(self._made)
            await engine.start()
        except (LatentRTError, OSError) as error:  # such as a full disk
            self._reason = f"the model does not load: {error}"
            _log.error("%s", self._reason)
        except Exception:
            self._reason = "the model does not load; the server's log says why"
            _log.exception("the model does not load")
        else:
            self._on_ready()
            self._engine, self._reason = engine, None
            _log.info("%s is ready after %.1f s", self.model, time.perf_counter() - begun)
        finally:
            thread.shutdown(wait=False)
