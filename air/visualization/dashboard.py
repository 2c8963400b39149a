"""A live visdom page of a run: curves, counts and pictures.

Each drawing sends every pane again, so that a resumed run continues its page, and a restarted
server shows all panes.
"""

import contextlib
import logging
import os
import queue
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from air.visualization.curves import Record
from air.visualization.snapshots import Snapshot
from air.visualization.visdom_panes import draw_page

DEFAULT_PORT = 8097  # of a visdom server


class Dashboard:
    """Draws a run in one visdom environment.

    A thread of its own sends the drawings, so that training never waits for the server. If the
    server goes down, the thread logs one warning, and the next drawing tries again.

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
        self._settings = dict(settings)
        self._records = list(records)
        self._drawn_at = -1
        # At most one drawing waits here; None ends the thread.
        self._drawings: queue.SimpleQueue[tuple[list[Record], Snapshot] | None]
        self._drawings = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="visdom", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """Tells the user where the page is."""
        address = f"{self.client.server}:{self.client.port}{self.client.base_url}"
        return f"Live plots: {address}/env/{self.env}"

    def record(self, record: Record) -> None:
        """Adds a line of metrics.jsonl, for the next drawing."""
        self._records.append(record)

    def due(self, step: int) -> bool:
        """Whether to draw at this step: the first one at or past a multiple of `every`."""
        return step // self.every != self._drawn_at // self.every

    def draw(self, snapshot: Snapshot) -> None:
        """Draws the snapshot and the records so far, in place of a drawing that still waits."""
        self._drawn_at = snapshot.step
        with contextlib.suppress(queue.Empty):
            self._drawings.get_nowait()
        self._drawings.put((self._records.copy(), snapshot))

    def close(self, patience: float = 10.0) -> None:
        """Waits until the last drawing is sent, at most `patience` seconds."""
        self._drawings.put(None)
        self._thread.join(patience)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; does not wait after a keyboard interrupt."""
        self.close(0.0 if kind is KeyboardInterrupt else 10.0)

    def _send(self) -> None:
        """Sends drawings until `close`."""
        is_down = False
        for records, snapshot in iter(self._drawings.get, None):
            try:
                draw_page(self.client, self.env, records, snapshot, self._settings)
                self.client.save([self.env])  # a restarted server will load the page
            except Exception as error:  # training must go on whatever visdom does
                if not is_down:
                    text = "no live plots for now, training continues: %s"
                    logging.getLogger("air").warning(text, error)
                is_down = True
            else:
                is_down = False


def connect(address: str | None) -> Any:  # noqa: ANN401
    """Makes a visdom client; None without an address.

    Args:
        address: Of the server, such as ``http://localhost:8097``; the scheme and the port may be
            left out. The environment variables VISDOM_USERNAME and VISDOM_PASSWORD are the login,
            if the server needs one.

    Raises:
        ConnectionError: If no server answers, or the server refuses; the message is one line for
            the user.
        ModuleNotFoundError: If visdom is not installed.
        ValueError: If the address has no host, or its port is not a number up to 65535.
    """
    if address is None:
        return None
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        port = parts.port or DEFAULT_PORT
        if not parts.hostname:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--visdom-server: expected an address such as http://localhost:{DEFAULT_PORT}, "
            f"got {address}"
        ) from None
    from air.visualization.visdom_client import Client

    server = f"{parts.scheme}://{parts.netloc.removesuffix(f':{parts.port}')}"
    try:
        return Client(
            server=server,
            port=port,
            base_url=parts.path.rstrip("/"),
            username=os.environ.get("VISDOM_USERNAME"),
            password=os.environ.get("VISDOM_PASSWORD"),
            raise_exceptions=True,
            use_incoming_socket=False,
        )
    except (PermissionError, AssertionError) as error:  # visdom asserts that there is a password
        raise ConnectionError(
            f"the visdom server at {server}:{port} refuses: {error}; a login is taken from "
            "VISDOM_USERNAME and VISDOM_PASSWORD"
        ) from None
    except (OSError, ValueError):
        raise ConnectionError(
            f"no visdom server answers at {server}:{port}; start one with: "
            f"python -m visdom.server -port {port}"
        ) from None
