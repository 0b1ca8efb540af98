"""Tells the user something: in the log, under the node, and as a toast (web/duca_notices.js)."""

from __future__ import annotations

import logging


def say(text: str, node_id: str | None = None) -> None:
    """Once is the caller's business. Works without a running server, as in tests."""
    logging.warning("[DuCa] %s", text)
    server = running_server()
    if server is not None:
        server.send_sync("duca_cache.notice", {"node": node_id, "text": text}, server.client_id)
    show(text, node_id)


def show(text: str, node_id: str | None = None) -> None:
    """Only under the node."""
    server = running_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def running_server():
    """The host's server; None in a process without one, as in tests."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)
