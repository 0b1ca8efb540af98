"""Sends prompts to a running ComfyUI over HTTP and WebSocket, as its web page does, and times their nodes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import aiohttp

Progress = Callable[[str, int, int], None]
_ANSWER_SECONDS = aiohttp.ClientTimeout(total=30)


class PromptError(Exception):
    """Raised with the server's reason when it refuses a prompt, or when a prompt fails while it runs."""


@dataclass
class Execution:
    """A finished prompt.

    Args:
        outputs: Of each output node by its id, as the server's history has them.
        seconds: Wall time of each node that was executed (not taken from the server's cache), by its id.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class ComfyClient:
    """Calls a server and waits for the answers. Every run is a WebSocket client of its own, so several can share one server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def run(self, prompt: dict[str, Any], on_progress: Progress | None = None) -> Execution:
        """Runs a prompt in API format to its end.

        Args:
            prompt: The nodes by id.
            on_progress: Is called with a node's id, the steps done and the number of steps.

        Raises:
            PromptError: The server refuses the prompt, or it fails.
        """
        return asyncio.run(self._run(prompt, on_progress or (lambda _node, _done, _steps: None)))

    def image(self, reference: dict[str, str]) -> bytes:
        """Returns the bytes of the file that an output refers to: {"filename", "subfolder", "type"}."""
        return asyncio.run(self._get_bytes(f"/view?{urlencode(reference)}"))

    def get(self, path: str) -> Any:
        """Returns the JSON at any path of the server, such as /object_info."""
        return json.loads(asyncio.run(self._get_bytes(path)))

    async def _run(self, prompt: dict[str, Any], on_progress: Progress) -> Execution:
        client_id = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0) as socket:
            execution = Execution(await self._submit(session, prompt, client_id))
            await _follow(socket, execution, on_progress)
            async with session.get(f"{self.url}/history/{execution.prompt_id}", timeout=_ANSWER_SECONDS) as answer:
                entry = (await answer.json()).get(execution.prompt_id)
        if entry is None:
            raise PromptError("the server ended the prompt but its history does not have it")
        execution.outputs = entry["outputs"]
        return execution

    async def _submit(self, session: aiohttp.ClientSession, prompt: dict[str, Any], client_id: str) -> str:
        body = {"prompt": prompt, "client_id": client_id}
        async with session.post(f"{self.url}/prompt", json=body, timeout=_ANSWER_SECONDS) as answer:
            reply = await answer.json(content_type=None)
        # The server runs the valid part of a prompt that is partly invalid. This client raises an error instead.
        if answer.status != 200 or reply.get("node_errors"):
            raise PromptError(_refusal(prompt, reply))
        return str(reply["prompt_id"])

    async def _get_bytes(self, path: str) -> bytes:
        async with aiohttp.ClientSession() as session, session.get(self.url + path, timeout=_ANSWER_SECONDS) as answer:
            if answer.status != 200:
                raise PromptError(f"the server answered {answer.status} to {path}")
            return await answer.read()


async def _follow(socket: aiohttp.ClientWebSocketResponse, execution: Execution, on_progress: Progress) -> None:
    """Reads messages until the prompt is done: the server sends `executing` with no node once it has written the history."""
    node, started = None, 0.0
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue  # a preview picture
        now, content = time.perf_counter(), message.json()
        kind, data = content["type"], content["data"]
        if data.get("prompt_id") != execution.prompt_id:
            continue
        if kind == "execution_error":
            where, what = f"{data['node_type']} (node {data['node_id']})", data["exception_message"].strip()
            raise PromptError(f"{where}: {data['exception_type']}: {what}")
        if kind == "execution_interrupted":
            raise PromptError("the prompt was interrupted")
        if kind == "progress":
            on_progress(data["node"], data["value"], data["max"])
        if kind == "executing":
            if node is not None:
                execution.seconds[node] = execution.seconds.get(node, 0.0) + now - started
            node, started = data["node"], now
            if node is None:
                return
    raise PromptError("the server closed the connection before the prompt was done")


def _refusal(prompt: dict[str, Any], reply: dict[str, Any]) -> str:
    """Returns the server's validation errors as text: which node is wrong, and why."""
    error = reply.get("error") or {}
    lines = [f"the server refused the prompt: {error.get('message', error) if isinstance(error, dict) else error}"]
    for node_id, problem in (reply.get("node_errors") or {}).items():
        node_type = problem.get("class_type") or prompt.get(node_id, {}).get("class_type", "?")
        lines += [f"  {node_type} (node {node_id}): {e.get('message', '')}: {e.get('details', '')}" for e in problem.get("errors", ())]
    return "\n".join(lines)
