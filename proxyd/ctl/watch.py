"""`watch`: connections of several proxies as they begin and end."""

import json
import selectors
import sys
import time
from collections.abc import Callable
from typing import Any

from proxyd.ctl.ask import describe
from proxyd.ctl.client import Client, ReplyError
from proxyd.ctl.find import Proxy
from proxyd.ctl.replies import UnexpectedError, event
from proxyd.ctl.text import escape, span
from proxyd.inspection.interfaces import PROXY
from proxyd.sizes import bytes_text


def watch(proxies: list[Proxy], form: str, complain: Callable[[str], None]) -> int:
    """Print events until all proxies have ended; return the exit status.

    Proxies that start later are not watched.
    """
    several = len(proxies) > 1
    failed = False
    with selectors.DefaultSelector() as selector:
        for proxy in proxies:
            try:
                client = Client(proxy.path, patience=None)
                client.send(f"{PROXY}.Watch", {}, more=True)
            except OSError as error:
                complain(describe(proxy, error))
                failed = True
                continue
            selector.register(client, selectors.EVENT_READ, proxy)
        while selector.get_map():
            for key, _ in selector.select():
                client, proxy = key.fileobj, key.data  # type: ignore[assignment]
                trouble = _print_events(client, proxy, several, form)
                if trouble:
                    complain(trouble)
                    failed = True
                    selector.unregister(client)
                    client.close()
    return 1 if failed or not proxies else 0


def _print_events(client: Client, proxy: Proxy, several: bool, form: str) -> str:
    """Print what has come; return why no more will come, or an empty string."""
    events, trouble = _read_events(client, proxy)
    for one in events:
        text = _json(proxy, one) if form != "off" else line(proxy, one, several)
        sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return trouble


def _read_events(client: Client, proxy: Proxy) -> tuple[list[dict[str, Any]], str]:
    """Return what has come, and why no more will come, or an empty string."""
    events = []
    try:
        going_on = client.read_some()
        for reply in client.complete():
            events.append(event(reply))  # noqa: PERF401 - kept if a later one is garbage
    except (OSError, ReplyError, UnexpectedError) as error:
        return events, describe(proxy, error)
    if going_on:
        return events, ""
    return (
        events,
        f"{escape(proxy.name)}: the proxy has ended, or has dropped a watcher that is slow",
    )


def _json(proxy: Proxy, reply: dict[str, Any]) -> str:
    return json.dumps(
        {"unit": proxy.unit or None, "socket": proxy.path} | reply, separators=(",", ":")
    )


def line(proxy: Proxy, reply: dict[str, Any], several: bool) -> str:
    """Return the line of one event."""
    row = reply["connection"]
    began = reply["event"] == "begin"
    usec = row["sinceUSec"] + (0 if began else row["ageUSec"])
    moment = time.strftime("%H:%M:%S", time.localtime(usec / 1_000_000))
    parts = [f"{moment}.{usec // 1000 % 1000:03d}"]
    if several:
        parts.append(escape(proxy.name.removesuffix(".service")))
    parts += [
        "begin" if began else "end  ",
        str(row["id"]),
        f"{escape(row['client'] or '-')} -> {escape(row['target'] or '-')}",
    ]
    text = " ".join(parts)
    if began:
        return text
    up, down = row["up"]["bytes"], row["down"]["bytes"]
    how = escape(reply.get("how") or "ended")
    return (
        f"{text}: {how} after {span(row['ageUSec'])}, {bytes_text(up)} up, {bytes_text(down)} down"
    )
