"""A visdom client that has a timeout and raises errors. Importing this module imports visdom."""

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
    """A `Visdom` that waits a limited time for answers, raises errors, and logs in when needed."""

    server: str
    port: int
    base_url: str
    username: str | None
    password: str
    _logged_in: requests.Session | None = None

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        with warnings.catch_warnings(action="ignore"):
            super().__init__(raise_exceptions=True, use_incoming_socket=False, **options)

    def _handle_post(self, url: str, data: Any = None) -> str:  # noqa: ANN401
        if self._logged_in is None:
            session = requests.Session()
            host = urllib.parse.urlsplit(self.server).hostname or ""
            local = host in ("localhost", "::1") or host.startswith("127.")
            session.trust_env = not local  # no proxy leads to this machine
            if self.username:
                login = {"username": self.username, "password": self.password}
                self._post(session, f"{self.server}:{self.port}{self.base_url}", json=login)
            self._logged_in = session
        return self._post(self._logged_in, url, data=data)

    def _post(self, session: requests.Session, url: str, **content: Any) -> str:  # noqa: ANN401
        answer = session.post(url, timeout=TIMEOUT_SECONDS, **content)
        if not answer.ok:
            self._logged_in = None  # a restarted server needs a new login
            raise PermissionError(f"visdom: {answer.status_code} {answer.reason}")
        return answer.text
