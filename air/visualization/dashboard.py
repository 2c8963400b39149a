"""A live visdom page of a run: curves, counts and pictures.

Each drawing sends every pane again, so that a resumed run continues its page, and a restarted
server shows all panes.
"""

import logging
import os
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from air.visualization.curves import History, Record
from air.visualization.snapshots import Snapshot
from air.visualization.visdom_panes import Page

RETRY_SECONDS = 10.0  # seconds from a failure to the next attempt


class Dashboard:
    """Draws a run in one visdom environment.

    A thread of its own sends the drawings, so that training never waits for the server. If the
    server goes down, the thread logs one warning and tries again until the server is back.

    Args:
        client: From `connect`.
        env: The environment; each character that visdom does not accept becomes "_".
        settings: Shown as a table.
        records: The lines of metrics.jsonl so far.
        every: Steps between drawings; None means 100.
    """

    def __init__(
        self,
        client: Any,  # noqa: ANN401  # visdom is imported only if used
        env: str,
        settings: Mapping[str, Any],
        records: Iterable[Record] = (),
        every: int | None = None,
    ) -> None:
        self.client = client
        self.env = re.sub(r"[^\w.-]", "_", env)  # visdom would split a name at a slash
        self.every = every or 100
        self.history = History(records)
        self._settings = dict(settings)
        self._drawn_at = -1
        self._pending: tuple[History, Snapshot] | None = None
        self._closing = False
        self._wake = threading.Condition()  # guards _pending and _closing
        self._thread = threading.Thread(target=self._work, name="visdom", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """Tells the user where the page is."""
        if self.client.offline:
            return f"Plots are recorded in {self.client.log_to_filename}."
        return f"Live plots: {self.client.server}:{self.client.port}/env/{self.env}"

    def record(self, record: Record) -> None:
        """Adds a line of metrics.jsonl, for the next drawing."""
        self.history.add(record)

    def due(self, step: int) -> bool:
        """Whether to draw at this step: the first one at or past a multiple of `every`."""
        return step // self.every != self._drawn_at // self.every

    def draw(self, snapshot: Snapshot) -> None:
        """Draws the snapshot and the records so far, in place of a drawing not yet sent."""
        self._drawn_at = snapshot.step
        with self._wake:
            self._pending = self.history.copy(), snapshot
            self._wake.notify()

    def close(self, patience: float = 10.0) -> None:
        """Waits until the last drawing is sent, at most `patience` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; does not wait after a keyboard interrupt."""
        self.close(0.0 if kind is KeyboardInterrupt else 10.0)

    def _work(self) -> None:
        """Sends drawings until `close`; after `close`, a failure is retried once."""
        page = Page(self.client, self.env)
        failures = 0  # in a row
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._closing)
                drawing = self._pending
            try:
                if drawing is None:
                    self.client.save([self.env])  # a restarted server will load the page
                    return
                page.draw(*drawing, self._settings)
            except Exception as error:  # training must go on whatever visdom does
                failures += 1
                if failures == 1:
                    text = "no live plots for now, training continues: %s"
                    logging.getLogger("air").warning(text, error)
                with self._wake:
                    if self._closing and failures > 1:
                        return
                    self._wake.wait_for(lambda: self._closing, RETRY_SECONDS)
            else:
                failures = 0
                with self._wake:
                    if self._pending is drawing:  # no newer one came meanwhile
                        self._pending = None


def connect(address: str | None) -> Any:  # noqa: ANN401
    """Makes a visdom client; None without an address.

    Args:
        address: Of the server, such as ``http://localhost:8097``. The environment variables
            VISDOM_USERNAME and VISDOM_PASSWORD are the login, if the server needs one.

    Raises:
        ConnectionError: If no server answers, or the server refuses; the message is one line for
            the user.
        ModuleNotFoundError: If visdom is not installed.
    """
    if address is None:
        return None
    from air.visualization.visdom_client import Client

    parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    address, port = f"{parts.scheme}://{parts.hostname}", parts.port or 8097
    try:
        return Client(
            server=address,
            port=port,
            username=os.environ.get("VISDOM_USERNAME"),
            password=os.environ.get("VISDOM_PASSWORD"),
            raise_exceptions=True,
            use_incoming_socket=False,
        )
    except (PermissionError, AssertionError) as error:  # visdom asserts that there is a password
        raise ConnectionError(
            f"the visdom server at {address}:{port} refuses: {error}; a login is taken from "
            "VISDOM_USERNAME and VISDOM_PASSWORD"
        ) from None
    except (OSError, ValueError):
        raise ConnectionError(
            f"no visdom server answers at {address}:{port}; start one with: "
            f"python -m visdom.server -port {port}"
        ) from None
