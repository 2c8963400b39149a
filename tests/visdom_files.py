"""Installs the scripts and fonts of visdom's page from npm packages.

visdom's server downloads these files from several CDNs when it first starts. This program downloads
the same list from the npm registry instead, for machines without access to the CDNs. The files of
MathJax and d3 stay empty: no pane needs them. The program needs npm.
"""

import functools
import io
import re
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import requests
import visdom
from visdom.server import build


@functools.cache
def package(name: str) -> bytes:
    """The archive of an npm package, such as jquery@3.1.1."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, timeout=120)
        (archive,) = Path(folder).iterdir()
        return archive.read_bytes()


def from_npm(url: str) -> bytes:
    """The file at an address of a CDN, from its npm package; empty for a file no pane needs."""
    if plotly := re.search(r"/plotly-([\d.]+)\.min\.js", url):
        name, path = f"plotly.js-dist-min@{plotly[1]}", "plotly.min.js"
    elif found := re.fullmatch(r"https://unpkg.com/([\w.-]+@[\d.]+)/?([^#?]*).*", url):
        name, path = found[1], found[2] or "index.js"
    else:
        return b""
    with tarfile.open(fileobj=io.BytesIO(package(name))) as archive:
        file = archive.extractfile(f"package/{path}")
        return file.read()


class Opener(urllib.request.OpenerDirector):
    """Opens addresses with `from_npm`."""

    def open(self, request: urllib.request.Request, *_: object) -> io.BytesIO:  # type: ignore[override]
        return io.BytesIO(from_npm(request.full_url))


if __name__ == "__main__":
    urllib.request.build_opener = lambda *_: Opener()  # type: ignore[assignment]
    requests.get = lambda url, **_: SimpleNamespace(  # type: ignore[assignment]
        content=from_npm(url), status_code=200, text="", ok=True
    )
    build.download_scripts()
    print(f"visdom {visdom.__version__} has the files of its page.")
