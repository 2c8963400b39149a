"""Gives visdom's server the scripts and fonts of its page, out of npm packages.

At its first start the server fetches them from several CDNs. Here its own list of them is followed
with the npm registry in their place, for machines that reach no other. MathJax and d3, which our
panes do without, are left empty. Run it as a program, with npm at hand.
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
    """What that address of a CDN would send."""
    if plotly := re.search(r"/plotly-([\d.]+)\.min\.js", url):
        name, path = f"plotly.js-dist-min@{plotly[1]}", "plotly.min.js"
    elif found := re.fullmatch(r"https://unpkg.com/([\w.-]+@[\d.]+)/?([^#?]*).*", url):
        name, path = found[1], found[2] or "index.js"
    else:
        return b""
    with tarfile.open(fileobj=io.BytesIO(package(name))) as archive:
        file = archive.extractfile(f"package/{path}")
        assert file is not None
        return file.read()


class Opener(urllib.request.OpenerDirector):
    """Opens addresses as `from_npm` does."""

    def open(self, request: urllib.request.Request, *_: object) -> io.BytesIO:  # type: ignore[override]
        return io.BytesIO(from_npm(request.full_url))


if __name__ == "__main__":
    urllib.request.build_opener = lambda *_: Opener()  # type: ignore[assignment]
    requests.get = lambda url, **_: SimpleNamespace(  # type: ignore[assignment]
        content=from_npm(url), status_code=200, text="", ok=True
    )
    build.download_scripts()
    print(f"visdom {visdom.__version__} has the files of its page.")
