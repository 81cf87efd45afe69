"""Serves the page on this machine: Gradio with nothing sent elsewhere, and no request from other sites."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from ti_jax.errors import InputError
from ti_jax.files import writable_folder
from ti_jax.startup import installed
from ti_jax.training.run_folder import exists

ASIDE = "ti_jax-ui-"  # folders for files on their way to the browser; the number of their process follows
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(root: str, host: str, port: int, models: Sequence[str]) -> None:
    """Serve the page until the process ends.

    Args:
      root: folder of the runs. port: 0: any that is free.

    Raises:
      InputError: the extra ``ui`` is missing, the address is in use, or a model or the folder cannot be used.
    """
    if not installed("gradio"):
        raise InputError("ti-jax ui needs Gradio: pip install 'ti_jax[ui]'")
    aside = _settle()
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from ti_jax.ui.page import Server, build
    from ti_jax.ui.runs import Runs
    from ti_jax.ui.settings import Models
    from ti_jax.ui.shown import STYLE, theme
    from ti_jax.ui.trying import Drawer

    offered = Models(models)
    with writable_folder(root):
        pass
    bound = _bound(host, port)
    if host not in LOOPBACK:
        print(
            f"warning: --host {host}: whoever reaches this machine there can start runs and see pictures; the page has "
            f"no password",
            file=sys.stderr,
        )
    # A page elsewhere could otherwise reach this one, under a name that leads to 127.0.0.1 or by its visitor's browser.
    guards = [Middleware(OwnOrigin)]
    if host in LOOPBACK:
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    page = build(Server(Runs(root), offered, Drawer(), aside))
    page.queue(default_concurrency_limit=4)
    # Not its launch, which asks the page for itself first, and fails behind a proxy. But only after that Gradio checks
    # where the files are that it is told of.
    page.has_launched = True
    app = gradio.mount_gradio_app(
        FastAPI(middleware=guards, openapi_url=None), page, path="/", footer_links=[], run_history=False,
        allowed_paths=[], enable_monitoring=False, ssr_mode=False, mcp_server=False, pwa=False, max_file_size="200mb",
        theme=theme(), css=STYLE,
    )  # fmt: skip
    address = f"{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    print(f"http://{address}  (runs in {os.path.realpath(root)}; Ctrl-C ends the page, not a run)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


class OwnOrigin:
    """ASGI middleware: refuses what a browser sends for a page of another site. Gradio would only hide the answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on what has no origin, or that of the host that it asks."""
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if origin is None or origin.partition(b"://")[2] == headers.get(b"host"):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"this page answers no other site"})


def _settle() -> Path:
    """What Gradio and its libraries read when they are imported; returns the folder for files of the page."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Ctrl-C ends a process at once, without a chance to clean up.
    for left in Path(tempfile.gettempdir()).glob(f"{ASIDE}*-*"):
        number = left.name.removeprefix(ASIDE).partition("-")[0]
        if number.isdecimal() and not exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{os.getpid()}-"))
    os.environ["GRADIO_TEMP_DIR"] = str(aside)
    atexit.register(shutil.rmtree, aside, ignore_errors=True)
    return aside


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which can be asked before the page is there.

    Raises:
      InputError: the address is in use, or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be served there ({error.strerror or error}); end what uses it, or "
            f"give another --port"
        ) from error
