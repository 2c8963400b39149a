"""A visdom client that has a timeout and raises errors. Importing this module imports visdom."""

import functools
import logging
import urllib.parse
import warnings
from typing import Any

import requests

with warnings.catch_warnings(action="ignore"):
    from visdom import Visdom

logging.getLogger("visdom").setLevel(logging.ERROR)

TIMEOUT_SECONDS = 10.0  # seconds to wait for an answer of the visdom server


class Client(Visdom):
    """A `Visdom` with its own `Session`, because visdom's session has no timeout.

    The constructor of `Visdom` logs in and sends a request. A timeout that is added to
    `Visdom.session` afterwards would come too late for a frozen server.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        with warnings.catch_warnings(action="ignore"):
            super().__init__(**options)

    @functools.cached_property
    def session(self) -> "Session":
        return Session(self)


class Session(requests.Session):
    """A session that logs in again if necessary, and raises an error if the server refuses.

    Args:
        client: Names the server, and the login if there is one.
    """

    def __init__(self, client: Any) -> None:  # noqa: ANN401
        super().__init__()
        self._client = client
        host = urllib.parse.urlparse(client.server).hostname or ""
        local = host in ("localhost", "::1") or host.startswith("127.")
        self.trust_env = not local  # no proxy leads to this machine

    def request(self, *arguments: Any, **options: Any) -> requests.Response:  # noqa: ANN401
        """Sends a request.

        Raises:
            ConnectionError: If there is no answer within `TIMEOUT_SECONDS`.
            PermissionError: If the answer is an error.
        """
        client = self._client
        if client.username and not self.cookies:
            login = {"username": client.username, "password": client.password}
            self._request("POST", f"{client.server}:{client.port}{client.base_url}", json=login)
        return self._request(*arguments, **options)

    def _request(self, *arguments: Any, **options: Any) -> requests.Response:  # noqa: ANN401
        options["timeout"] = TIMEOUT_SECONDS
        try:
            response = super().request(*arguments, **options)
        except requests.RequestException as error:
            raise ConnectionError(f"visdom: {type(error).__name__}") from error
        if not response.ok:
            self.cookies.clear()  # a restarted server needs a new login
            raise PermissionError(f"visdom: {response.status_code} {response.reason}")
        return response
