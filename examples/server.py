"""A server of texts: `python examples/server.py build/serve [alice=alice.onnx_adapter ...]`, then

    curl -N localhost:8000/generate -d '{"prompt": "Once upon a time", "adapter": "alice"}'

Requests that wait for the same adapter and settings are one batch; batches take turns, a token at a time. Who hangs up
is generated for no longer.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

BATCH = 8
"""The most requests in one batch."""


class Wanted(BaseModel):
    """What a client asks for."""

    prompt: str = Field(min_length=1)
    adapter: str | None = None
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)


@dataclass(eq=False)
class Request:
    """A request, and the pieces of its answer; None is the last."""

    wanted: Wanted
    tokens: list[int]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    over: bool = False

    def put(self, piece: str | Exception | None) -> None:
        """Hand a piece over to the client's own thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def end(self, error: Exception | None = None) -> None:
        """End the answer."""
        if not self.over:
            self.over = True
            self.put(error)


class Batch:
    """Requests that are continued together; shorter prompts are padded behind, as onnxruntime-genai wants it."""

    def __init__(self, engine: Engine, requests: list[Request]):
        self.requests, self.steps = requests, 0
        self.streams = [engine.tokenizer.create_stream() for _ in requests]
        longest = max(len(request.tokens) for request in requests)
        most = longest + max(request.wanted.max_new_tokens for request in requests)
        temperature = requests[0].wanted.temperature
        search: dict[str, Any] = {"do_sample": temperature > 0, "max_length": min(most, engine.context)}
        if temperature > 0:
            search["temperature"] = temperature
        params = og.GeneratorParams(engine.model)
        params.set_search_options(batch_size=len(requests), **search)
        self.generator = og.Generator(engine.model, params)
        if requests[0].wanted.adapter is not None:
            self.generator.set_active_adapter(engine.adapters, requests[0].wanted.adapter)
        rows = [[*r.tokens, *[engine.pad] * (longest - len(r.tokens))] for r in requests]
        self.generator.append_tokens(np.array(rows, dtype=np.int32))

    def step(self, ends: frozenset[int]) -> bool:
        """Generate a token for every request; False when all are over."""
        self.generator.generate_next_token()
        self.steps += 1
        for request, stream, token in zip(
            self.requests, self.streams, self.generator.get_next_tokens(), strict=True
        ):
            if not request.over and int(token) not in ends:
                request.put(stream.decode(token))
            if int(token) in ends or self.steps >= request.wanted.max_new_tokens or self.generator.is_done():
                request.end()
        return not all(request.over for request in self.requests)


class Engine:
    """A thread that generates.

    Args:
        directory: what `{format: genai}` wrote.
        adapters: name -> file, for a directory with `adapters: swap`.
    """

    def __init__(self, directory: Path, adapters: Mapping[str, Path] | None = None):
        og.disable_telemetry_events()
        self.model = og.Model(str(directory))
        self.tokenizer = og.Tokenizer(self.model)
        self.tokenizer.update_options(add_special_tokens="true")
        self.names, self.adapters = frozenset(adapters or {}), og.Adapters(self.model)
        for name, path in (adapters or {}).items():
            self.adapters.load(str(path), name)
        self.context: int = _read(directory / "genai_config.json")["model"]["context_length"]
        told = _read(directory / "manifest.json")["products"]["genai"]["batches"]
        self.any_lengths: bool = told == "texts of any lengths"
        self.pad, self.ends = self.tokenizer.pad_token_id, frozenset(map(int, self.tokenizer.eos_token_ids))
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.batches: list[Batch] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while self._admit():
            for batch in list(self.batches):
                self._step(batch)

    def _admit(self) -> bool:
        """Make batches of the requests that wait; wait for one where nothing else is to do. False at the end."""
        requests: list[Request] = []
        while not self.waiting.empty() or not (self.batches or requests):
            request = self.waiting.get()
            if request is None:
                return False
            requests.append(request)
        groups: dict[Any, list[Request]] = {}
        for request in requests:
            groups.setdefault(self._shared(request), []).append(request)
        for group in groups.values():
            for start in range(0, len(group), BATCH):
                self._start(group[start : start + BATCH])
        return True

    def _shared(self, request: Request) -> tuple[Any, ...]:
        """What the requests of one batch have in common."""
        length = None if self.any_lengths else len(request.tokens)
        return request.wanted.adapter, request.wanted.temperature, length

    def _start(self, requests: list[Request]) -> None:
        try:
            self.batches.append(Batch(self, requests))
        except Exception as error:  # such as a prompt that does not fit: its clients are told
            for request in requests:
                request.end(error)

    def _step(self, batch: Batch) -> None:
        try:
            goes_on = not all(request.over for request in batch.requests) and batch.step(self.ends)
        except Exception as error:
            goes_on = False
            for request in batch.requests:
                request.end(error)
        if not goes_on:
            self.batches.remove(batch)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def make_app(engine: Engine) -> FastAPI:
    """The web application of an engine."""
    app = FastAPI()

    @app.post("/generate")
    async def generate(wanted: Wanted) -> StreamingResponse:
        if wanted.adapter is not None and wanted.adapter not in engine.names:
            raise HTTPException(
                404, f"no adapter {wanted.adapter!r}; there are: {', '.join(sorted(engine.names)) or 'none'}"
            )
        tokens = [int(token) for token in engine.tokenizer.encode(wanted.prompt)]
        if not 0 < len(tokens) < engine.context:
            raise HTTPException(422, f"the prompt has {len(tokens)} tokens, and the context {engine.context}")
        request = Request(wanted, tokens, asyncio.get_running_loop())
        engine.waiting.put(request)
        return StreamingResponse(_answer(request), media_type="text/plain; charset=utf-8")

    @app.get("/status")
    async def status() -> dict[str, Any]:
        running = sum(not request.over for batch in list(engine.batches) for request in batch.requests)
        return {"adapters": sorted(engine.names), "running": running, "batches": len(engine.batches)}

    return app


async def _answer(request: Request) -> AsyncIterator[str]:
    """The pieces of an answer; when its client hangs up, the rest is not generated."""
    try:
        while (piece := await request.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        request.over = True


def main() -> None:
    """Serve what the command line names."""
    adapters = dict(word.split("=", 1) for word in sys.argv[2:])
    engine = Engine(Path(sys.argv[1]), {name: Path(path) for name, path in adapters.items()})
    engine.thread.start()
    uvicorn.run(make_app(engine), port=8000)


if __name__ == "__main__":
    main()
