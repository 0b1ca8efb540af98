"""Shows notices to the user: in the log, under the node, and as a toast (web/duca_notices.js)."""

from __future__ import annotations

import logging


def say(text: str, node_id: str | None = None) -> None:
    """Shows a notice in all three places, at every call. Without a running server, as in tests, only in the log."""
    logging.warning("[DuCa] %s", text)
    server = running_server()
    if server is not None:
        server.send_sync("duca_cache.notice", {"node": node_id, "text": text}, server.client_id)
    show(text, node_id)


def show(text: str, node_id: str | None = None) -> None:
    """Shows a text under the node only, in place of the one before."""
    server = running_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def running_server():
    """Returns the host's server, None in a process without one, as in tests."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)
