"""The command `adaptc generate`: a prompt is continued, and the text shown as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptc.emit.genai.files import CONFIG
from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.generation.settings import Decoder, Settings
from adaptc.generation.stop import Stop
from adaptc.products.memory import peak_memory

ADVICE = "adaptc generate takes a directory of `{format: genai}`, or a file of `{format: onnx, cache: true}`"


def generate(
    path: Path,
    prompt: str,
    settings: Settings,
    chat: bool | None,
    stop: tuple[str, ...],
    tokenizer: str | None,
    show: Callable[[str], None],
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        path: a directory of onnxruntime-genai, or an ONNX program with a cache.
        prompt: the text.
        settings: how it is continued.
        chat: put it into the chat template; None does so where there is one.
        stop: texts that end the answer, and are not shown.
        tokenizer: a directory with a tokenizer, in place of the base's.
        show: called with each piece of the answer.
        adapter: an `.onnx_adapter` file, where the path takes adapters; None for the base.

    Returns:
        `text`; `finished` (`end` of the text, `length`, `context` where that is full, or `stop`); `tokens` and
        `prompt_tokens`; `seconds_to_first_token`, `tokens_per_second` after that, `peak_memory_bytes` of the process;
        `seed`, and the `search` settings in force.

    Raises:
        AdaptcError: the path holds nothing that continues texts, or the prompt is empty.
    """
    decoder, seed = _decoder(path, tokenizer, adapter), settings.drawn_from()
    tokens = decoder.tokens(prompt, chat)
    if not tokens:
        raise AdaptcError("the prompt has no token", "write one: --prompt 'Once upon a time'")
    text, count, first, ends = "", 0, 0.0, Stop(stop)
    start = time.perf_counter()
    for _, piece in decoder.stream(tokens, settings, seed):
        count += 1
        first = first or time.perf_counter()
        shown = ends.add(piece)
        text += shown
        show(shown)
        if ends.reached:
            break
    last = time.perf_counter()
    rest = ends.rest()
    show(rest)
    return {
        "text": text + rest,
        "finished": _finished(count, settings, len(tokens), decoder.longest) if not ends.reached else "stop",
        "tokens": count,
        "prompt_tokens": len(tokens),
        "seconds_to_first_token": first - start,
        "tokens_per_second": (count - 1) / (last - first) if count > 1 else None,
        "peak_memory_bytes": peak_memory(),
        "seed": seed,
        "search": decoder.search(settings),
    }


def _finished(count: int, settings: Settings, prompt: int, longest: int | None) -> str:
    """Why an answer of so many tokens is over."""
    if count == settings.max_new_tokens:
        return "length"
    return "context" if longest is not None and prompt + count >= longest else "end"


def summary(result: dict[str, Any]) -> str:
    """What a generation cost, in a line."""
    speed = result["tokens_per_second"]
    shown = f"{speed:.1f} tokens/s, " if speed else ""
    search = result["search"]
    drawn = {name: search[name] for name in ("temperature", "top_k", "top_p") if name in search}
    how = ", ".join(f"{name} {value}" for name, value in {**drawn, "seed": result["seed"]}.items())
    return (
        f"{result['tokens']} tokens (ended by {result['finished']}), {shown}"
        f"first token of a prompt of {result['prompt_tokens']} after {result['seconds_to_first_token']:.3f} s, "
        f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB, "
        f"{f'drawn: {how}' if search['do_sample'] else 'the likeliest tokens'}"
    )


def _decoder(path: Path, tokenizer: str | None, adapter: Path | None) -> Decoder:
    """What continues texts at a path.

    Raises:
        SpecError: nothing there does; says what would.
    """
    if not path.exists():
        raise SpecError([Problem("no such path", file=str(path), notes=(ADVICE,))])
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise SpecError([Problem(f"no {CONFIG} there", file=str(path), notes=(ADVICE,))])
        if tokenizer is not None:
            raise AdaptcError(f"{path} has a tokenizer of its own, so --tokenizer is not read; leave it out")
        from adaptc.generation.genai import GenaiModel

        model = GenaiModel(path)
        return model if adapter is None else model.adapted(adapter)
    if path.suffix != ".onnx":
        raise SpecError([Problem("nothing that continues texts", file=str(path), notes=(ADVICE,))])
    from adaptc.generation.onnx import OnnxDecoder

    return OnnxDecoder(path, tokenizer, adapter)
