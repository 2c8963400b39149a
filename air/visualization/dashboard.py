"""A live visdom page of a run: curves, counts, and pictures of what the model makes of its scenes.

Each pane is made once, under a name of its own, and from then on replaced as a whole. So nothing
is doubled when a run goes on, and nothing is missing when the server comes back.
"""

import json
import logging
import os
import re
import threading
import time
import urllib.parse
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from air.visualization.curves import History, Record
from air.visualization.snapshots import Snapshot
from air.visualization.visdom_panes import ORDER, Pane, picture_panes, plot_panes, settings_pane

TIMEOUT_SECONDS = 10.0  # seconds to wait for visdom's answer; training does not wait
RETRY_SECONDS = 10.0  # seconds from a failure to the next attempt
SHARE = 0.04  # of the time that drawing may take where nothing else is asked for


class Dashboard:
    """Draws a run in one visdom environment, in a thread of its own: training never waits for it.

    A server that fails later on costs one warning; what it missed is drawn when it answers again.

    Args:
        client: From `connect`.
        env: The environment; characters that visdom cannot take become "_".
        settings: To be shown as text.
        records: Of metrics.jsonl, up to now.
        every: Steps between drawings; None for 100, and for fewer drawings where they would take
            more than `SHARE` of the time.
    """

    def __init__(
        self,
        client: Any,  # noqa: ANN401  # visdom is imported where it is asked for
        env: str,
        settings: Mapping[str, Any],
        records: Iterable[Record] = (),
        every: int | None = None,
    ) -> None:
        self.history = History(records)
        self.every = every
        self.env = re.sub(r"[^\w.-]", "_", env)  # visdom would split a name at a slash
        self._settings = settings_pane(settings)
        self.client = client
        self._pending: tuple[Snapshot, list[Pane]] | None = None
        self._drawn_at, self._rest_until = -1, 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="visdom", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """Where to look at it, for the user."""
        if self.client.offline:
            return f"Plots are recorded in {self.client.log_to_filename}."
        return f"Live plots: {self.client.server}:{self.client.port}/env/{self.env}"

    def record(self, record: Record) -> None:
        """Takes up a line of metrics.jsonl; draws nothing yet."""
        self.history.add(record)

    def due(self, step: int) -> bool:
        """Whether to draw at this step, the first at or past a multiple of `every`."""
        every = self.every or 100
        if step // every == self._drawn_at // every:
            return False
        with self._wake:
            return self.every is not None or time.monotonic() >= self._rest_until

    def draw(self, snapshot: Snapshot, seconds: float = 0.0) -> None:
        """Hands over what is to be seen from now on, in place of what was not drawn yet.

        Args:
            snapshot: What the model makes of its scenes.
            seconds: What it took to look at them.
        """
        panes = [*plot_panes(self.history), self._settings]
        self._drawn_at = snapshot.step
        self._rest(seconds)
        with self._wake:
            self._pending = snapshot, panes
            self._wake.notify()

    def close(self, patience: float = 10.0) -> None:
        """Waits until the last drawing is on the page, so long at the most."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes, but at once where the user cannot wait."""
        self.close(0.0 if kind is KeyboardInterrupt else 10.0)

    def _rest(self, seconds: float) -> None:
        """Draws no more for as long as these seconds of drawing buy."""
        with self._wake:
            self._rest_until = max(self._rest_until, time.monotonic()) + seconds / SHARE

    def _work(self) -> None:
        """Draws whatever comes, until `close`."""
        failing = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._closing)
                drawing, self._pending = self._pending, None
            try:
                if drawing is None:  # the page outlives the server
                    self.client._send({"data": [self.env]}, endpoint="save")
                    return
                self._send_all(*drawing)
                failing = False
            except Exception as error:
                again, failing = failing, True
                if not again:
                    text = "no live plots for now, only training: %s"
                    logging.getLogger("air").warning(text, error)
                with self._wake:
                    if again and self._closing:
                        return
                    self._wake.wait_for(lambda: self._closing, RETRY_SECONDS)
                    self._pending = self._pending or drawing  # a newer one took its place

    def _send_all(self, snapshot: Snapshot, plots: list[Pane]) -> None:
        """Sends every pane anew: a server that was started again knows none of them."""
        start = time.thread_time()
        panes = [*picture_panes(snapshot), *plots]
        for pane in sorted(panes, key=lambda pane: ORDER.index(pane["win"])):
            self.client._send({"eid": self.env, **pane})
        self._rest(time.thread_time() - start)


def connect(server: str | None, port: int, log: str | None = None) -> Any:  # noqa: ANN401
    """The client of visdom, with limits to its patience; None where nothing is asked of it.

    Args:
        server: Address of the server; None for none. A login is taken from the environment
            variables VISDOM_USERNAME and VISDOM_PASSWORD.
        port: Its port.
        log: A file to record the session in, for visdom's ``replay_log``; None for none.

    Raises:
        ConnectionError: If no server answers, or it refuses; the message is one line for the user.
        ModuleNotFoundError: If visdom is not installed.
        ValueError: If the file cannot be written.
    """
    if server is None and log is None:
        return None
    options: dict[str, Any] = {"log_to_filename": log, "offline": server is None}
    try:
        if log is not None:
            with open(log, "a"):
                pass
    except OSError as error:
        raise ValueError(f"--viz-log: cannot write {log}: {error.strerror}") from error
    if server is None:
        return _make_client(**options)
    address = (server if "://" in server else f"http://{server}").rstrip("/")
    _reach(address, port)
    for name in ("username", "password"):
        options[name] = os.environ.get(f"VISDOM_{name.upper()}")
    try:
        options |= {"raise_exceptions": True, "use_incoming_socket": False}
        return _make_client(server=address, port=port, **options)
    except (OSError, RuntimeError, AssertionError) as error:
        raise ConnectionError(
            f"the visdom server at {address}:{port} refuses: {error}; a login is taken from "
            "VISDOM_USERNAME and VISDOM_PASSWORD"
        ) from None


def _make_client(**options: Any) -> Any:  # noqa: ANN401
    """A client like visdom's own, which waits for ever, and takes every answer for a good one."""
    logging.getLogger("visdom").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import requests
        from visdom import Visdom

    class Client(Visdom):
        server: str
        port: int
        base_url: str
        username: str | None
        password: str
        opened: Any = None

        @property
        def session(self) -> Any:  # noqa: ANN401
            if self.opened is None:
                self.opened = requests.Session()
                self.opened.trust_env = not _is_local(self.server)
                if self.username:
                    login = json.dumps({"username": self.username, "password": self.password})
                    self._handle_post(f"{self.server}:{self.port}{self.base_url}", login)
            return self.opened

        def _handle_post(self, url: str, data: str | None = None) -> str:
            session = self.session
            try:
                response = session.post(url, data=data, timeout=TIMEOUT_SECONDS)
                response.raise_for_status()
            except requests.RequestException as error:
                self.opened = None  # the next attempt logs in anew
                raise ConnectionError(f"visdom: {_reason(error)}") from error
            return str(response.text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Client(**options)


def _reach(address: str, port: int) -> None:
    """Asks for any answer, so that a wrong address is told apart from a server that refuses."""
    import requests

    try:
        with requests.Session() as session:
            session.trust_env = not _is_local(address)
            session.get(f"{address}:{port}", timeout=TIMEOUT_SECONDS)
    except (requests.RequestException, ValueError):
        what = f"no visdom server answers at {address}:{port}; start one with:"
        raise ConnectionError(f"{what} python -m visdom.server -port {port}") from None


def _reason(error: Exception) -> str:
    answer = getattr(error, "response", None)
    return type(error).__name__ if answer is None else f"{answer.status_code} {answer.reason}"


def _is_local(url: str) -> bool:
    """Whether it is an address of this machine, to which no proxy leads."""
    host = urllib.parse.urlparse(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
