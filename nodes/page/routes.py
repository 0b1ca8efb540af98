"""Answers the pack's two addresses on the host's server: the plan for a node's inputs, and the last run of a node."""

from __future__ import annotations

import asyncio
import json
import logging

from aiohttp import web

from ...cache_core.planning.text import ScheduleTextError
from .live_runs import live_runs
from .notices import running_server
from .plan_preview import preview

_LONGEST = 64 * 1024  # bytes of a request


def register() -> None:
    """Adds the addresses to the running server. Does nothing in a process without one."""
    server = running_server()
    if server is not None:
        server.routes.post("/duca_cache/plan")(plan)
        server.routes.get("/duca_cache/run")(run)


async def plan(request: web.Request) -> web.Response:
    """Answers POST with `plan_preview.preview` of the JSON body.

    Errors are {"error": a message for the user}, with status 400 for a wrong request, 413 for one that is too long and 500 for an error of
    ours. For the text of a schedule, "position" has the index of the wrong character.
    """
    text = await _body(request)
    if text is None:
        return web.json_response({"error": "the request is too long"}, status=413)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return web.json_response({"error": "the request is not JSON, or nested too deep"}, status=400)
    try:
        return web.json_response(await asyncio.to_thread(preview, body))
    except ScheduleTextError as error:
        return web.json_response({"error": str(error), "input": "text", "position": error.position}, status=400)
    except ValueError as error:
        return web.json_response({"error": str(error), "input": None, "position": None}, status=400)
    except Exception:  # its own message may name files of this machine, so it goes to the log only
        logging.exception("[DuCa] the plan could not be worked out")
        return web.json_response({"error": "the plan could not be worked out: see the log", "input": None, "position": None}, status=500)


async def _body(request: web.Request) -> bytes | None:
    """Reads the body. Returns None as soon as it is too long, whatever length the request states."""
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > _LONGEST:
            return None
    return bytes(body)


async def run(request: web.Request) -> web.Response:
    """Answers GET with `LiveRun.data` of the run that goes on under the node `node_id`, or of its last one. Status 404 if there is none."""
    found = live_runs.run_of(request.query.get("node_id", ""))
    if found is None:
        return web.json_response({"error": "nothing has run under this node"}, status=404)
    return web.json_response(found.data())
