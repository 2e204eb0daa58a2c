"""Weights from a training service: `tinker://RUN/weights/NAME`, of our own server or of Tinker's cloud, by plain HTTP.

The key goes to the service and nowhere else: the files themselves come from signed links, which need none. What arrives
is unpacked as hostile input.
"""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any

from grpo_gsm8k.errors import ConfigError, LaunchError
from grpo_gsm8k.launch.archive import path_fault, unpack
from grpo_gsm8k.runs.clean import one_line
from grpo_gsm8k.runs.files import disk_errors

SCHEME = "tinker://"
KINDS = ("weights", "sampler_weights", "external_weights")
TIMEOUT_S = 120.0
UNREACHABLE = (OSError, http.client.HTTPException, ValueError)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer here: urllib would send the key along."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: not followed."""
        return


def is_path(model: str) -> bool:
    """Whether a model is named by a service's path."""
    return model.startswith(SCHEME)


def download(path: str, into: Path, base_url: str) -> None:
    """Write the files of a checkpoint into a folder that exists.

    Raises:
        ConfigError: no such path, no address, no key, or one that is refused.
        LaunchError: the service cannot be reached, or sends something else.
    """
    run, kind, name = _parts(path)
    root = base_url or os.environ.get("TINKER_BASE_URL", "")
    key = os.environ.get("TINKER_API_KEY", "").strip()
    if not root:
        raise ConfigError(f"--model {path}: give the service's address, with --base_url or TINKER_BASE_URL")
    if not key:
        raise ConfigError(f"--model {path}: the environment variable TINKER_API_KEY holds no key; set it")
    checkpoint = f"{root.rstrip('/')}/api/v1/training_runs/{run}/checkpoints/{kind}/{urllib.parse.quote(name, safe='')}"
    if kind != "external_weights" and (link := _archive_link(f"{checkpoint}/archive", key)):
        with disk_errors(into), tempfile.TemporaryFile(dir=into) as archive:  # has no name there
            _copy(path, "the archive", link, archive)
            archive.seek(0)
            skipped = unpack(archive, into).skipped
        if skipped:
            raise LaunchError(f"{path}: the archive holds {', '.join(f'{k} ({v})' for k, v in skipped.items())}"[:300])
        return
    for file, link in _file_links(f"{checkpoint}/external_weights_urls", key).items():
        _fetch(path, file, link, into)


def _parts(path: str) -> tuple[str, str, str]:
    """(run, kind, name). Raises `ConfigError`."""
    parts = path.removeprefix(SCHEME).split("/")
    if len(parts) != 3 or not all(parts) or parts[1] not in KINDS:
        raise ConfigError(f"--model {path}: must read tinker://RUN/weights/NAME (or sampler_weights, external_weights)")
    return urllib.parse.quote(parts[0], safe=":"), parts[1], parts[2]


def _ask(url: str, key: str) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """The service's answer, whatever its status. Raises `LaunchError` where there is none."""
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        request = urllib.request.Request(_checked(url), headers={"X-API-Key": key})
        answer: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_S)
        return answer
    except urllib.error.HTTPError as fault:
        return fault
    except UNREACHABLE as fault:
        raise LaunchError(f"{url}: cannot be reached: {one_line(str(fault), 200)}") from None


def _archive_link(url: str, key: str) -> str:
    """Where the service has the checkpoint as one tar file; "" for a service that no longer does."""
    with _ask(url, key) as answer:
        if answer.status in (301, 302, 303, 307, 308):
            return answer.headers.get("Location") or ""
        if answer.status == 200:
            return str(_json(url, answer.read()).get("url") or "")
        if answer.status in (404, 405, 410):  # gone, or the checkpoint is: the other route says which
            return ""
        raise _refused(url, answer)


def _file_links(url: str, key: str) -> dict[str, str]:
    """Each file's link."""
    with _ask(url, key) as answer:
        if answer.status != 200:
            raise _refused(url, answer)
        links = _json(url, answer.read()).get("urls")
    if not isinstance(links, dict) or not links:
        raise LaunchError(f"{url}: lists no files")
    if strange := next((name for name in links if "/" in name or path_fault(name)), None):
        raise LaunchError(f"{url}: lists a file {strange!r}, which is not written")
    return {str(name): str(link) for name, link in links.items()}


def _fetch(path: str, file: str, link: str, into: Path) -> None:
    """One file, straight to the disk."""
    with disk_errors(into / file), (into / file).open("xb") as handle:
        _copy(path, file, link, handle)


def _copy(path: str, what: str, link: str, into: IO[bytes]) -> None:
    """What a signed link leads to; the key is not sent there. Raises `LaunchError` unless it arrives whole."""
    try:
        answer = urllib.request.urlopen(_checked(link), timeout=TIMEOUT_S)
    except UNREACHABLE as fault:
        raise LaunchError(f"{path}: {what} not downloaded: {one_line(str(fault), 200)}") from None
    with answer:
        while piece := _piece(path, what, answer):
            into.write(piece)
        wanted = answer.headers.get("Content-Length")
    if wanted and wanted.isdecimal() and int(wanted) != into.tell():
        raise LaunchError(f"{path}: {what} broke off in the middle; try again")


def _piece(path: str, what: str, answer: Any) -> bytes:
    try:
        read: bytes = answer.read(1 << 20)
    except UNREACHABLE as fault:
        raise LaunchError(f"{path}: {what} broke off in the middle: {one_line(str(fault), 200)}") from None
    return read


def _checked(url: str) -> str:
    """The URL, which must be one of HTTP: urllib would also read files."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise LaunchError(f"{one_line(url, 100)}: is no address of HTTP")
    return url


def _json(url: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LaunchError(f"{url}: answers with something other than JSON")
    return found


def _refused(url: str, answer: Any) -> ConfigError | LaunchError:
    """What the service says in place of an answer."""
    raw = answer.read()
    try:
        said = json.loads(raw).get("detail")
    except (ValueError, AttributeError):
        said = raw.decode(errors="replace")
    message = f"{url}: {answer.status}: {one_line(str(said or 'refused'), 200)}"
    return ConfigError(message) if answer.status < 500 else LaunchError(message)
