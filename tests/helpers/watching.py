"""Runs a prompt on a server and listens to it as the page does."""

from __future__ import annotations

import asyncio
import struct
import time
import uuid

import aiohttp

_TEXT_UNDER_A_NODE = 3  # the host's number for this kind of binary message


def watch(url: str, prompt: dict, node: str | None = None, interrupt_at: str | None = None) -> tuple[list[str], list[dict], float]:
    """Runs a prompt to its end.

    Args:
        node: The node whose texts are collected.
        interrupt_at: Start of the text at which the prompt is interrupted.

    Returns:
        The texts shown under `node`, all messages up to the prompt's end, and the seconds from the interrupt to the end.
    """
    return asyncio.run(_watch(url, prompt, node, interrupt_at))


async def _watch(url: str, prompt: dict, node: str | None, interrupt_at: str | None) -> tuple[list[str], list[dict], float]:
    client, texts, messages, asked = uuid.uuid4().hex, [], [], 0.0
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket:
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            assert answer.status == 200, await answer.text()
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                if kind == _TEXT_UNDER_A_NODE and message.data[8 : 8 + length].decode() == node:
                    texts.append(message.data[8 + length :].decode())
                if interrupt_at is not None and not asked and texts and texts[-1].startswith(interrupt_at):
                    asked = time.monotonic()
                    async with session.post(f"{url}/interrupt") as answer:
                        assert answer.status == 200
            elif message.type is aiohttp.WSMsgType.TEXT:
                messages.append(message.json())
                if messages[-1]["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return texts, messages, time.monotonic() - asked
    raise AssertionError("the server closed the connection")
