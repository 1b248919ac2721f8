"""The commands that use what was compiled: `adaptc run` on a text, `adaptc bench` side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaptc.cli.application import Json
from adaptc.cli.output import print_json

if TYPE_CHECKING:
    from adaptc.products.bench import Bench


def run(
    path: Annotated[
        Path,
        typer.Argument(
            help="an ONNX program, a torch artifact or a Hugging Face checkpoint", show_default=False
        ),
    ],
    text: Annotated[
        str, typer.Option(help="the text; the question of question-answering", show_default=False)
    ],
    pair: Annotated[
        str | None, typer.Option(help="a second text: the other sentence, or the one with the answer")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="the directory of the tokenizer; the base's if left out")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a product on a text: classes by their names, an embedding, or the next tokens."""
    from adaptc.products.predictor import predict

    prediction = predict(path, text, pair, tokenizer=tokenizer)
    print_json(prediction.to_json()) if as_json else sys.stdout.write(f"{prediction}\n")


def bench(
    path: Annotated[Path, typer.Argument(help="a product, or a folder of products", show_default=False)],
    rows: Annotated[
        Path | None, typer.Option(help=".jsonl with a label in each row: the accuracy of each product too")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="compare with this ONNX program, or with `base` in transformers")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="threads that compute; may be given several times")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="rows of a batch; may be given several times")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="tokens of a row; may be given several times")
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long each product is timed at each size")] = 1.0,
    as_json: Json = False,
) -> None:
    """Time products side by side, with their size, memory and accuracy."""
    from adaptc.cli.screen import Screen
    from adaptc.products.bench import bench as measure

    with Screen(quiet=True).working():
        result = measure(
            path, rows=rows, against=against, threads=threads or (1,), batches=batch or (1, 8),
            lengths=length or (16, 128), seconds=seconds,
        )  # fmt: skip
    print_json(result.to_json()) if as_json else _show(result)


def report(
    build: Annotated[
        Path,
        typer.Argument(help="a folder of products, a product's own folder, or its file", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option(help="the page to write; report.html in the folder if left out")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="what `adaptc bench BUILD --json` printed, for latency and accuracy")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one page of HTML on a build: graph, proofs, sizes, errors, latency, spec. It needs no network."""
    from adaptc.cli.screen import Screen
    from adaptc.products.report.page import report as write

    path = write(build, output, bench=bench)
    print_json({"path": str(path)}) if as_json else Screen().done([path])


def _show(result: Bench) -> None:
    from adaptc.cli.bench_tables import bench_tables
    from adaptc.cli.tables import show

    show(*bench_tables(result))
