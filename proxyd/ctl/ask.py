"""Several proxies asked at the same time, so that one that hangs does not delay the others."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from proxyd.ctl import replies
from proxyd.ctl.client import PATIENCE, Client, ReplyError
from proxyd.ctl.find import Proxy
from proxyd.ctl.replies import UnexpectedError
from proxyd.ctl.text import escape
from proxyd.errors import reason
from proxyd.inspection.interfaces import METRICS, PROXY

Result = TypeVar("Result")

_THREADS_MAX = 16

_EMPTY = (f"{PROXY}.NoSuchConnection", f"{METRICS}.NoSuchMetric")
"""How a stream without elements ends: Varlink has no empty stream."""


class Answers(Generic[Result]):
    """What the proxies have answered, in their order."""

    __slots__ = ("errors", "results")

    def __init__(self) -> None:
        self.results: list[tuple[Proxy, Result]] = []
        self.errors: list[str] = []
        """A line for each proxy that has not answered."""


def connections(
    proxies: list[Proxy], target: str | None, state: str | None, patience: float = PATIENCE
) -> Answers[list[dict[str, Any]]]:
    """Return the live connections of each proxy."""
    chosen = {"target": target, "state": state}
    parameters = {name: value for name, value in chosen.items() if value is not None}

    def ask(client: Client) -> tuple[list[dict[str, Any]], int]:
        found, missing = _elements(client, f"{PROXY}.List", parameters)
        return [replies.connection(one) for one in found], missing

    answers = gather(proxies, ask, patience)
    listed: Answers[list[dict[str, Any]]] = Answers()
    listed.errors = answers.errors
    for proxy, (found, missing) in answers.results:
        listed.results.append((proxy, found))
        if missing:
            listed.errors.append(f"{escape(proxy.name)}: {missing} more could not be listed")
    return listed


def statuses(proxies: list[Proxy]) -> Answers[dict[str, Any]]:
    """Return the reply to Status of each proxy."""
    return gather(proxies, lambda client: replies.status(client.call(f"{PROXY}.Status", {})))


def metrics(
    proxies: list[Proxy], patience: float = PATIENCE
) -> Answers[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Return the descriptions and the values of the metrics of each proxy."""

    def ask(client: Client) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        described, _ = _elements(client, f"{METRICS}.Describe", {})
        values, _ = _elements(client, f"{METRICS}.List", {})
        return [replies.metric(one) for one in described], [replies.metric(one) for one in values]

    return gather(proxies, ask, patience)


def _elements(
    client: Client, method: str, parameters: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Return all replies of a stream, which may be empty, and how many the proxy lacks."""
    found = []
    try:
        for one in client.stream(method, parameters):
            found.append(one)  # noqa: PERF402 - kept if the stream ends with an error
    except ReplyError as error:
        if error.name == f"{PROXY}.Incomplete":
            return found, replies.missing(error.parameters)
        if error.name not in _EMPTY:
            raise
    return found, 0


def gather(
    proxies: list[Proxy], ask: Callable[[Client], Result], patience: float = PATIENCE
) -> Answers[Result]:
    """Call `ask` with a connection to each proxy."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while (at := waiting.get()) >= 0:
            done.put((at, _result(proxies[at], ask, patience)))

    count = min(len(proxies), _THREADS_MAX)
    for at in [*range(len(proxies)), *[-1] * count]:
        waiting.put(at)
    for _ in range(count):
        # Daemons: at the end of the program nobody waits for a proxy that hangs.
        threading.Thread(target=work, daemon=True).start()
    found = dict(done.get() for _ in proxies)
    answers: Answers[Result] = Answers()
    for at, proxy in enumerate(proxies):
        result = found[at]
        if isinstance(result, OSError | ReplyError | UnexpectedError):
            answers.errors.append(describe(proxy, result))
        elif isinstance(result, Exception):
            raise result
        else:
            answers.results.append((proxy, result))
    return answers


def _result(proxy: Proxy, ask: Callable[[Client], Result], patience: float) -> Result | Exception:
    try:
        with Client(proxy.path, patience) as client:
            return ask(client)
    except Exception as error:  # noqa: BLE001 - for the main thread, which waits for a result
        return error


def describe(proxy: Proxy, error: Exception) -> str:
    """Return the line that says why a proxy has not answered."""
    if not isinstance(error, OSError):
        return f"{escape(proxy.name)}: {escape(error)}"
    where = f" at {escape(proxy.path)}" if proxy.unit else ""
    return f"{escape(proxy.name)}: no answer{where}: {reason(error)}"
