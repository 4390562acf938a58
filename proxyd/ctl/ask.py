"""Several proxies asked at the same time, so that one that hangs does not delay the others."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from proxyd.ctl import replies
from proxyd.ctl.client import INTERFACE, METRICS, PATIENCE, Client, ReplyError
from proxyd.ctl.find import Proxy
from proxyd.ctl.replies import UnexpectedError
from proxyd.ctl.text import escape
from proxyd.errors import reason

Result = TypeVar("Result")

_THREADS_MAX = 16

_EMPTY = (f"{INTERFACE}.NoSuchConnection", f"{METRICS}.NoSuchMetric")
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

    def ask(client: Client) -> list[dict[str, Any]]:
        found = elements(client, f"{INTERFACE}.List", parameters)
        return [replies.connection(one) for one in found]

    return gather(proxies, ask, patience)


def statuses(proxies: list[Proxy]) -> Answers[dict[str, Any]]:
    """Return the reply to Status of each proxy."""
    return gather(proxies, lambda client: replies.status(client.call(f"{INTERFACE}.Status", {})))


def metrics(
    proxies: list[Proxy], patience: float = PATIENCE
) -> Answers[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Return the descriptions and the values of the metrics of each proxy."""

    def ask(client: Client) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        described = elements(client, f"{METRICS}.Describe", {})
        values = elements(client, f"{METRICS}.List", {})
        return [replies.metric(one) for one in described], [replies.metric(one) for one in values]

    return gather(proxies, ask, patience)


def elements(client: Client, method: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all replies of a stream, which may be empty."""
    try:
        return list(client.stream(method, parameters))
    except ReplyError as error:
        if error.name in _EMPTY:
            return []
        raise


def gather(
    proxies: list[Proxy], ask: Callable[[Client], Result], patience: float = PATIENCE
) -> Answers[Result]:
    """Call `ask` with a connection to each proxy."""
    answers: Answers[Result] = Answers()

    def ask_one(proxy: Proxy) -> tuple[Proxy, Result | None, str]:
        try:
            with Client(proxy.path, patience) as client:
                return proxy, ask(client), ""
        except (OSError, ReplyError, UnexpectedError) as error:
            return proxy, None, describe(proxy, error)

    if not proxies:
        return answers
    with ThreadPoolExecutor(min(len(proxies), _THREADS_MAX)) as pool:
        for proxy, result, error in pool.map(ask_one, proxies):
            if error:
                answers.errors.append(error)
            else:
                answers.results.append((proxy, result))  # type: ignore[arg-type]
    return answers


def describe(proxy: Proxy, error: Exception) -> str:
    """Return the line that says why a proxy has not answered."""
    if not isinstance(error, OSError):
        return f"{escape(proxy.name)}: {escape(error)}"
    where = f" at {escape(proxy.path)}" if proxy.unit else ""
    return f"{escape(proxy.name)}: no answer{where}: {reason(error)}"
