"""A headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab; `events` are what it has reported so far."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.events = socket, 0, list[dict[str, Any]]()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.number:
                return dict(message.get("result", message))
            self.events.append(message)

    async def value(self, expression: str) -> Any:
        """What an expression is, as JSON."""
        wrapped = f"JSON.stringify({expression})"
        found = await self.call("Runtime.evaluate", expression=wrapped, returnByValue=True)
        return json.loads(found["result"].get("value", "null"))

    async def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        for _ in range(int(seconds * 10)):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {expression}; the page says {await self.value('document.body.innerText')}")

    async def picture(self, path: Path, width: int) -> None:
        """The whole page as PNG."""
        height = await self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 6000), "scale": 1}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def of(self, method: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [event["params"] for event in self.events if event["method"] == method]


@asynccontextmanager
async def opened(url: str, folder: Path, width: int, height: int, scheme: str = "light") -> AsyncIterator[Page]:
    """A tab of this size that shows a page."""
    assert PROGRAM
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen([PROGRAM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session:
            socket = await session.ws_connect(await _address(session, folder), max_msg_size=0)
            page = Page(socket)
            for name in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{name}.enable")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            await page.call("Emulation.setDeviceMetricsOverride", **size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            await page.call("Emulation.setEmulatedMedia", features=features)
            await page.call("Page.navigate", url=url)
            await page.until("document.readyState === 'complete'")
            yield page
    finally:
        process.kill()
        process.wait()


async def _address(session: aiohttp.ClientSession, folder: Path) -> str:
    """Of the tab's socket; the browser writes its port into its folder."""
    for _ in range(300):
        with contextlib.suppress(OSError, ValueError, IndexError):
            port = int((folder / "DevToolsActivePort").read_text().split()[0])
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
                return str(tabs[0]["webSocketDebuggerUrl"])
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")
