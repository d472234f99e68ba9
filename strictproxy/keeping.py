"""
What keeps tasks over a restart, put together: store, files, detached requests, callbacks, pages.

Owned by the composition root, which starts it before anything is dispatched,
and stops it after everything else has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from strictproxy.config.model import RouteConfig, TasksConfig
from strictproxy.errors import ConfigError
from strictproxy.proxy import ProxyResource
from strictproxy.task_pages import MayList, TaskPages
from strictproxy.tasks.callbacks import Callbacks, Resolve
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.files import TaskFiles
from strictproxy.tasks.store import Record, SqliteStore, StoreError, StoreInUse
from strictproxy.upstream import Upstream

_log = Logger()

#: How often a store that another process has is tried, seconds.
_STORE_WAIT = 0.5


class TaskKeeper:
    """
    The tasks of one proxy.

    :param resolve: gives the addresses of those who are called.
    :param may_list: says who may see the tasks of all clients.
    """

    def __init__(
        self, proxy: ProxyResource, resolve: Resolve, may_list: MayList, reactor: Any
    ) -> None:
        self._proxy = proxy
        self._resolve = resolve
        self._may_list = may_list
        self._reactor = reactor
        self._config: TasksConfig | None = None
        self._store: SqliteStore | None = None
        self._stopped = False

    # -- start

    async def start(
        self,
        config: TasksConfig,
        routes: Iterable[RouteConfig],
        upstreams: Mapping[str, Upstream],
    ) -> None:
        """
        Take up what there was; to be called before anything is dispatched.

        :raise StoreError: the store cannot be used. To go on without it would be to
            forget which slots are taken.
        :raise ConfigError: there is no key to sign callbacks with.
        :raise OSError: there is no place for files.
        """
        proxy = self._proxy
        store = self._store = SqliteStore(config.directory, self._reactor)
        files = TaskFiles(config.directory)
        detached = DetachedTasks(
            config, store, files, self._reactor, proxy.make_run, proxy.detached_ended
        )
        try:
            records = await self._load(store)
            documents = await store.load_detached()
            callbacks = self._make_callbacks(config, detached)
            # A task that is no good is told before any file is removed.
            waiting = detached.restore(documents, proxy.hold)
            await deferToThreadPool(
                self._reactor, self._reactor.getThreadPool(), files.prepare, *detached.names()
            )
        except (StoreError, ConfigError, OSError):
            store.stop()
            raise
        self._config = config
        proxy.tasks.store = store
        proxy.tasks.restore(records, routes, upstreams, proxy.next_number)
        proxy.detached = detached
        proxy.pages = TaskPages(detached, self._reactor, self._may_list)
        for task in waiting:
            detached.begin(task)
        self._set_callbacks(callbacks)

    async def _load(self, store: SqliteStore) -> list[Record]:
        """Read what was running; while another process has it, as during a change-over, wait."""
        told = False
        while True:
            try:
                return await store.load()
            except StoreInUse as error:
                if not told:
                    _log.warn("waiting: {error}", error=error)
                told = True
                await deferLater(self._reactor, _STORE_WAIT)
                if self._stopped:
                    raise

    def _make_callbacks(self, config: TasksConfig, detached: DetachedTasks) -> Callbacks | None:
        if config.callbacks is None:
            return None
        return Callbacks(config.callbacks, self._reactor, self._resolve, detached.save)

    def _set_callbacks(self, callbacks: Callbacks | None) -> None:
        old, self._proxy.callbacks = self._proxy.callbacks, callbacks
        if old is not None:
            old.stop()
        if callbacks is not None:
            for task in self._proxy.detached or ():
                if task.ended:
                    callbacks.tell(task)

    # -- reload

    def change(self, config: TasksConfig | None) -> Callable[[], None]:
        """
        Prepare another configuration.

        :return: puts it into force; cannot fail.
        :raise ConfigError: it cannot be had; nothing has changed.
        """
        old, detached = self._config, self._proxy.detached
        if (None if config is None else config.directory) != (
            None if old is None else old.directory
        ):
            raise ConfigError("tasks.directory cannot change while the proxy runs")
        if config is None or config == old or detached is None:
            return lambda: None
        callbacks = self._make_callbacks(config, detached)

        def apply() -> None:
            self._config = detached.config = config
            self._set_callbacks(callbacks)

        return apply

    # -- stop

    def withdraw(self) -> None:
        """Begin no detached request any more: those that wait go on after the restart."""
        if self._proxy.detached is not None:
            self._proxy.detached.withdraw()

    @property
    def busy(self) -> bool:
        """Whether a task runs, or is being written down."""
        detached = self._proxy.detached
        return bool(len(self._proxy.tasks) or (detached is not None and detached.running))

    def interrupt(self) -> None:
        """End what runs, and let nobody wait any more."""
        self._stopped = True
        proxy = self._proxy
        for each in (proxy.detached, proxy.callbacks, proxy.pages):
            if each is not None:
                each.stop()

    def stop(self) -> None:
        """Give every slot back, and close the store once everything is written."""
        self._proxy.tasks.stop()
        if self._store is not None:
            self._store.stop()

    # -- looking in

    def active(self) -> dict[tuple[str, str, str], int]:
        """Return how many tasks wait or run, by upstream, route and state."""
        found: Counter[tuple[str, str, str]] = Counter()
        for task in self._proxy.tasks:
            found[task.upstream.name, task.route.name, task.state.value] += 1
        for each in self._proxy.detached or ():
            if not each.ended:
                record = each.record
                found[record.upstream, record.route, record.state.value] += 1
        return found
