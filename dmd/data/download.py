"""Downloading a public dataset: resumable, verified, and never half a file under its real name."""

import hashlib
import os
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from dmd.data import mosi_utterances
from dmd.options import nearest

# For each dataset: where its files are, at a commit that never changes, and their SHA-256.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    mosi_utterances.NAME: (
        "https://raw.githubusercontent.com/soujanyaporia/"
        "contextual-utterance-level-multimodal-sentiment-analysis/"
        "f1199e608b42f13878f724d82b6b2adaed8f42fe/data",
        mosi_utterances.FILES,
    )
}
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes


def fetch(
    name: str = mosi_utterances.NAME,
    to: str | Path | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> Path:
    """Download the files of a dataset that are not there yet, and return their folder.

    to: the folder; None: the one named after the dataset below $DMD_DATA or `data/downloads`,
        where `dmd.data.load` looks.
    base_url: another address that holds the same files.
    progress: report on stderr.
    Each file grows as `FILE.part`, is checked by SHA-256 and only then gets its name; an
    interrupted download goes on where it stopped. Raises ValueError for an unknown dataset or
    for content that is not the published one (its part is deleted), and OSError where the
    network or the folder fails.
    """
    if name not in SOURCES:
        raise ValueError(nearest(name, SOURCES, "downloadable dataset"))
    address, files = SOURCES[name]
    folder = mosi_utterances.default_root() / name if to is None else Path(to)
    for n, (path, digest) in enumerate(files.items(), start=1):
        say = _Progress(f"[{n}/{len(files)}] {path}", progress)
        target = folder / path
        if target.is_file() and _sha256(target) == digest:
            say.done("is there already")
            continue
        part = _part_for(target)
        url = f"{(base_url or address).rstrip('/')}/{path}"
        if _sha256(part) != digest:
            try:
                _download(url, part, say)
            except (OSError, HTTPException) as error:
                if part.stat().st_size == 0:
                    part.unlink()
                raise OSError(
                    f"downloading {url} failed ({_reason(error)}): run the same command again "
                    f"to go on where it stopped, or get that file by other means and save it "
                    f"as {target}"
                ) from error
        found = _sha256(part)
        if found != digest:
            part.unlink()
            raise ValueError(
                f"{url} is not the published file (SHA-256 {found}, expected {digest}) and was "
                f"deleted: run the same command again, or get that file by other means and save "
                f"it as {target}"
            )
        os.replace(part, target)
        say.done("verified")
    return folder


def _part_for(target: Path) -> Path:
    """The file that grows until it may be called `target`; made if it isn't there."""
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.open("ab").close()
    except OSError as error:
        raise OSError(
            f"can't write to {part.parent} ({_reason(error)}): name another folder to download to"
        ) from error
    return part


def _download(url: str, part: Path, say: "_Progress") -> None:
    """Add to `part` what it lacks of the file at `url`."""
    have = part.stat().st_size
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # 416: the part is already as long as the file, yet not the file
            raise
        have, response = 0, urlopen(url, timeout=TIMEOUT)
    with response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        size = response.headers.get("Content-Length")
        total = None if size is None else have + int(size)
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                say.step(have, total)
    if total is not None and have < total:
        raise OSError(f"the connection was cut after {have:,} of {total:,} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


class _Progress:
    """One line on stderr for a file; on a terminal it counts up."""

    def __init__(self, title: str, shown: bool) -> None:
        self.title, self.shown = title, shown
        self.live = shown and sys.stderr.isatty()

    def step(self, have: int, total: int | None) -> None:
        if self.live:
            of = "" if total is None else f" of {total / 1e6:.1f}"
            print(f"\r{self.title}: {have / 1e6:.1f}{of} MB", end="", file=sys.stderr, flush=True)

    def done(self, how: str) -> None:
        if self.shown:
            start = "\r" if self.live else ""
            print(f"{start}{self.title}: {how}{' ' * 12 * self.live}", file=sys.stderr, flush=True)
