"""The examples of serving run: a chat, and a server on localhost whose clients hang up midway."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from adaptc.generation.genai import GenaiModel
from tests.served import Served, Swapped

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """The module `examples/server.py`."""
    spec = importlib.util.spec_from_file_location("examples_server", EXAMPLES / "server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["examples_server"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["examples_server"]


@pytest.fixture
def engine(server: Any, served: Served) -> Iterator[Any]:
    """An engine whose thread runs."""
    engine = server.Engine(served.directory)
    engine.thread.start()
    yield engine
    engine.waiting.put(None)


@pytest.fixture
def port(server: Any, engine: Any) -> Iterator[int]:
    """The port on localhost that the server listens on."""
    yield from listening_port(server, engine)


@pytest.fixture
def swapping_port(server: Any, swapped: Swapped) -> Iterator[int]:
    """The same for a server that swaps two adapters."""
    engine = server.Engine(swapped.directory, swapped.files)
    engine.thread.start()
    yield from listening_port(server, engine)
    engine.waiting.put(None)


def listening_port(server: Any, engine: Any) -> Iterator[int]:
    """The port that an engine's application listens on, as long as it is asked for."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.make_app(engine), log_level="error", lifespan="off"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: web.started)
    yield listening.getsockname()[1]
    web.should_exit = True
    thread.join(10)
    listening.close()


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Client:
    """A client of the server. It has sent its request; the answer is not read yet."""

    def __init__(self, port: int, prompt: str | None = None, **wanted: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        if prompt is None:
            self.connection.request("GET", "/status")
        else:
            body = json.dumps({"prompt": prompt, **wanted})
            self.connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        self.response = self.connection.getresponse()

    def leave(self) -> None:
        """Hang up."""
        self.response.close()
        self.connection.close()

    def whole(self) -> str:
        """The whole answer."""
        text = self.response.read().decode()
        self.leave()
        return text


def status(port: int) -> dict[str, Any]:
    return json.loads(Client(port).whole())


def expected(served: Served, prompt: str, new: int) -> str:
    """What follows a prompt alone."""
    model = GenaiModel(served.directory)
    (answer,) = model.greedy([model.tokens(prompt, False)], new)
    stream = model.tokenizer.create_stream()
    return "".join(stream.decode(token) for token in answer if token not in model.ends)


PROMPTS = ("To be or not to be", "s", "the mind", "whether tis nobler in the mind to suffer")


def test_requests_at_once_get_what_each_gets_alone(served: Served, port: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda prompt: Client(port, prompt, max_new_tokens=20).whole(), 2 * PROMPTS)
        got = list(answers)
    assert got == 2 * [expected(served, prompt, 20) for prompt in PROMPTS]
    until(lambda: status(port) == {"adapters": [], "running": 0, "batches": 0})


def test_requests_that_wait_are_one_batch(server: Any, served: Served, engine: Any, monkeypatch: Any) -> None:
    sizes: list[int] = []
    whole = server.Batch.__init__

    def counted(self: Any, engine: Any, requests: Any) -> None:
        sizes.append(len(requests))
        whole(self, engine, requests)

    monkeypatch.setattr(server.Batch, "__init__", counted)

    class Loop:
        def call_soon_threadsafe(self, put: Any, piece: Any) -> None:
            put(piece)

    made = [
        server.Request(server.Wanted(prompt=text, max_new_tokens=4), [5 + n] * (n + 1), Loop())
        for n, text in enumerate("abcdefghij")
    ]
    paused = server.Engine(served.directory)
    for request in made:
        paused.waiting.put(request)
    paused.thread.start()
    until(lambda: all(request.over for request in made))
    assert sizes == [8, 2]
    paused.waiting.put(None)


def test_who_hangs_up_is_generated_for_no_longer(
    server: Any, served: Served, port: int, engine: Any, monkeypatch: Any
) -> None:
    """Two of four clients leave midway; the others get their whole answers, and the batches end early."""
    steps: list[int] = []
    step = server.Batch.step

    def slowly(self: Any, ends: Any) -> bool:
        time.sleep(0.02)
        steps.append(1)
        return step(self, ends)

    monkeypatch.setattr(server.Batch, "step", slowly)
    leaving = [Client(port, prompt, max_new_tokens=100) for prompt in PROMPTS[:2]]
    for client in leaving:
        assert client.response.read1(1)
    staying = [Client(port, prompt, max_new_tokens=10) for prompt in PROMPTS[2:]]
    assert status(port)["running"] >= 2
    for client in leaving:
        client.leave()
    got = [client.whole() for client in staying]
    assert got == [expected(served, prompt, 10) for prompt in PROMPTS[2:]]
    until(lambda: status(port)["batches"] == 0)
    assert len(steps) < 150, "it went on for clients that had left"


WHO = ("alice", None, "bob")


def written(swapped: Swapped, prompt: str, adapter: str | None, new: int) -> str:
    """What transformers writes behind a prompt with an adapter in its weights, in the package's own characters."""
    model = GenaiModel(swapped.directory)
    tokens = model.tokens(prompt, False)
    with torch.no_grad():
        made = swapped.merged(adapter).generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
    stream = model.tokenizer.create_stream()
    answer = [token for token in made[0, len(tokens) :].tolist() if token not in model.ends]
    return "".join(stream.decode(token) for token in answer)


@pytest.mark.slow
def test_adapters_and_the_base_are_mixed(swapped: Swapped, swapping_port: int) -> None:
    wanted = [(prompt, who) for prompt in PROMPTS for who in WHO]
    expected = [written(swapped, prompt, who, 12) for prompt, who in wanted]
    assert len({*expected[:3]}) == 3, "each adapter writes otherwise"

    def ask(request: tuple[str, str | None]) -> str:
        return Client(swapping_port, request[0], adapter=request[1], max_new_tokens=12).whole()

    with ThreadPoolExecutor(len(wanted)) as pool:
        assert list(pool.map(ask, wanted)) == expected
    until(lambda: status(swapping_port) == {"adapters": ["alice", "bob"], "running": 0, "batches": 0})


@pytest.mark.slow
def test_who_hangs_up_changes_no_answer_of_another_adapter(
    server: Any, swapped: Swapped, swapping_port: int, monkeypatch: Any
) -> None:
    step = server.Batch.step

    def slowly(self: Any, ends: Any) -> bool:
        time.sleep(0.02)
        return step(self, ends)

    monkeypatch.setattr(server.Batch, "step", slowly)
    prompt = PROMPTS[0]
    expected = [written(swapped, prompt, who, 16) for who in WHO]
    leaving = [Client(swapping_port, prompt, adapter=who, max_new_tokens=100) for who in WHO]
    for client in leaving:
        assert client.response.read1(1)
    staying = [Client(swapping_port, prompt, adapter=who, max_new_tokens=16) for who in WHO]
    for client in leaving:
        client.leave()
    assert [client.whole() for client in staying] == expected
    until(lambda: status(swapping_port)["batches"] == 0)


@pytest.mark.slow
def test_an_adapter_that_is_not_there_is_told(swapping_port: int) -> None:
    client = Client(swapping_port, "hi", adapter="carol")
    assert client.response.status == 404
    assert "no adapter 'carol'; there are: alice, bob" in client.whole()


def test_what_cannot_be_served_is_told(port: int) -> None:
    refused = {
        404: [{"prompt": "hi", "adapter": "alice"}],
        422: [{"prompt": "x" * 400}, {"prompt": ""}, {"prompt": "hi", "max_new_tokens": 0}],
    }
    for code, requests in refused.items():
        for wanted in requests:
            client = Client(port, **wanted)
            assert client.response.status == code
            assert {404: "no adapter 'alice'", 422: "detail"}[code] in client.whole()


def test_the_chat_answers(served: Served) -> None:
    script = EXAMPLES / "chat.py"
    assert len(script.read_text().splitlines()) <= 26
    words = [sys.executable, str(script), str(served.directory)]
    ran = subprocess.run(words, input="To be\nor not\n\n", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("> ")
    assert ran.stdout.count("\n> ") == 2
    assert len(ran.stdout) > 10
