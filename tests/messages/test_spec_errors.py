"""Each wrong spec names its line, its column, what was expected and what to do."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from adaptc.errors import Problem, SpecError
from adaptc.spec.spec import load, require_base

HEAD = "version: 1\nbase: {model: ./m}\n"
PYTHON = 'version: 1\nbase: {python: "m:build"}\ninputs: {x: "float32[batch]"}\n'
LORA = HEAD + "adapt:\n  - method: lora\n    target: all-linear\n"


def problems_in(tmp_path: Path, text: str | bytes, *overrides: str) -> list[Problem]:
    path = tmp_path / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def adapted(option: str) -> str:
    return f"{LORA}    {option}\n"


def emitted(options: str) -> str:
    return f"{HEAD}emit:\n  - {{format: onnx, path: m.onnx, {options}}}\n"


ONE_PROBLEM = {
    # attention, caches, onnxruntime-genai
    "a form of attention that there is not": (
        emitted("attention: flash"), 4, 45, "emit.0.attention",
        "expected 'standard', 'gqa' or 'plain', got 'flash'",
    ),
    "a cache that is a number": (
        emitted("cache: 1"), 4, 41, "emit.0.cache", "expected true or false, got 1",
    ),
    "standard attention before ONNX had it": (
        emitted("cache: true, opset: 20, attention: standard"), 4, 69, "emit.0.attention",
        "ONNX has Attention since opset 23, and this entry asks for 20",
    ),
    "ONNX Runtime's attention for any runtime": (
        emitted("cache: true, target_runtime: standard, attention: gqa"), 4, 84, "emit.0.attention",
        "GroupQueryAttention is ONNX Runtime's own, and this entry asks for ONNX's operations",
    ),
    "attention with a past, without a cache": (
        emitted("attention: gqa"), 4, 45, "emit.0.attention",
        "GroupQueryAttention is for keys and values of the past, and this entry has no cache",
    ),
    "an opset that is too old": (
        emitted("cache: true, opset: 17"), 4, 54, "emit.0.opset", "must be at least 18, got 17",
    ),
    "a form of attention in a served directory": (
        HEAD + "emit:\n  - {format: genai, path: serve, attention: plain}\n", 4, 34, "emit.0.attention",
        "unknown key 'attention'",
    ),
    "adapters to be swapped, and none": (
        HEAD + "emit:\n  - {format: genai, path: serve, adapters: swap}\n", 4, 44, "emit.0.adapters",
        "there are no `adapters:` to choose from",
    ),
    "a context without a token": (
        HEAD + "emit:\n  - {format: genai, path: serve, context_length: 0}\n", 4, 50, "emit.0.context_length",
        "must be at least 1, got 0",
    ),
    "an end that is no token": (
        HEAD + "emit:\n  - {format: genai, path: serve, eos_token_id: -1}\n", 4, 48, "emit.0.eos_token_id",
        "must be at least 0, got -1",
    ),
    # options of a method
    "rank 0": (adapted("r: 0"), 6, 8, "adapt.0.r", "must be greater than 0, got 0"),
    "rank is text": (adapted("r: '8'"), 6, 8, "adapt.0.r", "expected a whole number, got '8'"),
    "rank is a fraction": (adapted("r: 8.5"), 6, 8, "adapt.0.r", "expected a whole number, got 8.5"),
    "rank is true": (adapted("r: true"), 6, 8, "adapt.0.r", "expected a whole number, got true"),
    "rank is empty": (adapted("r:"), 6, 5, "adapt.0.r", "expected a whole number, got nothing"),
    "rank in a pattern": (
        adapted("rank_pattern: {q: 0}"), 6, 23, "adapt.0.rank_pattern.q", "must be greater than 0, got 0",
    ),
    "alpha negative": (adapted("alpha: -1"), 6, 12, "adapt.0.alpha", "must be greater than 0, got -1"),
    "alpha by its alias": (
        adapted("lora_alpha: -1"), 6, 17, "adapt.0.lora_alpha", "must be greater than 0, got -1",
    ),
    "alpha infinite": (adapted("alpha: .inf"), 6, 12, "adapt.0.alpha", "must be a finite number, got inf"),
    "dropout above 1": (adapted("dropout: 1.5"), 6, 14, "adapt.0.dropout", "must be less than 1, got 1.5"),
    "dropout below 0": (adapted("dropout: -0.1"), 6, 14, "adapt.0.dropout", "must be at least 0, got -0.1"),
    "yes is text": (adapted("rslora: yes"), 6, 13, "adapt.0.rslora", "expected true or false, got 'yes'"),
    "bad name": (adapted("name: a b"), 6, 11, "adapt.0.name", "must match [A-Za-z0-9_-]+, got 'a b'"),
    "unknown option": (
        adapted("drop_out: 0.1"), 6, 5, "adapt.0.drop_out",
        "unknown key 'drop_out'; did you mean 'dropout'? known: method, name, target, exclude, on_alias, r, "
        "rank_pattern, alpha, alpha_pattern, dropout, rslora",
    ),
    "option of another method": (
        HEAD + "adapt: [{method: ia3, target: x, r: 8}]\n", 3, 34, "adapt.0.r", "unknown key 'r'",
    ),
    "both spellings": (
        adapted("alpha: 3\n    lora_alpha: 4"), 7, 5, "adapt.0.lora_alpha",
        "another spelling of 'alpha', which is given too: keep one",
    ),
    # which method, which modules
    "unknown method": (
        HEAD + "adapt:\n- method: lorra\n  target: x\n", 4, 11, "adapt.0.method",
        "unknown method 'lorra'; did you mean 'lora'? known: ",
    ),
    "method is a number": (HEAD + "adapt: [{method: 3}]\n", 3, 18, "adapt.0.method", "unknown method 3"),
    "method and adapter": (
        HEAD + "adapt:\n- method: lora\n  adapter: ./a\n", 5, 3, "adapt.0.adapter",
        "an entry has 'method', 'adapter' or 'combine', only one of them",
    ),
    "no method": (
        HEAD + "adapt:\n- target: x\n", 4, 3, "adapt.0",
        "an entry needs 'method', 'adapter' or 'combine'; its keys are: target",
    ),
    "entry is a word": (HEAD + "adapt: [lora]\n", 3, 9, "adapt.0", "expected a mapping, got 'lora'"),
    "entry is empty": (HEAD + "adapt:\n-\n", 4, 1, "adapt.0", "expected a mapping, got nothing"),
    "adapt is a mapping": (HEAD + "adapt: {method: lora}\n", 3, 8, "adapt", "expected a list, got a mapping"),
    "no target": (HEAD + "adapt:\n  - method: lora\n", 4, 5, "adapt.0.target", "required, but missing"),
    "target is a number": (
        HEAD + "adapt: [{method: lora, target: 3}]\n", 3, 32, "adapt.0.target",
        "expected a pattern, a list of patterns or a mapping, got 3",
    ),
    "no patterns": (
        HEAD + "adapt: [{method: lora, target: []}]", 3, 32, "adapt.0.target", "must not be empty",
    ),
    "empty pattern": (
        HEAD + "adapt: [{method: lora, target: ['']}]", 3, 33, "adapt.0.target.0", "must not be empty",
    ),
    "bad regex": (
        HEAD + "adapt: [{method: lora, target: [x, 're:(a']}]", 3, 36, "adapt.0.target.1",
        "'re:(a' is not a regular expression: missing )",
    ),
    "bad regex by itself": (
        HEAD + "adapt: [{method: lora, target: 're:(a'}]", 3, 32, "adapt.0.target",
        "'re:(a' is not a regular expression",
    ),
    "bad regex excluded": (
        adapted("exclude: [a, 're:[']"), 6, 18, "adapt.0.exclude.1", "'re:[' is not a regular expression",
    ),
    "layers backwards": (
        HEAD + "adapt: [{method: lora, target: {layers: 5-1}}]", 3, 41, "adapt.0.target.layers",
        "the range '5-1' runs backwards",
    ),
    "layers in words": (
        HEAD + "adapt: [{method: lora, target: {layers: first}}]", 3, 41, "adapt.0.target.layers",
        "expected layers such as '0-5,11', got 'first'",
    ),
    "unknown role": (
        HEAD + "adapt: [{method: lora, target: {role: attention.values}}]", 3, 39, "adapt.0.target.role",
        "unknown role 'attention.values'; did you mean 'attention.value'? known: attention.query, attention.key",
    ),
    "unknown key of a target": (
        HEAD + "adapt: [{method: lora, target: {rol: attention.value}}]", 3, 33, "adapt.0.target.rol",
        "unknown key 'rol'; did you mean 'role'? known: name, type, layers, op, role",
    ),
    "empty mapping": (
        HEAD + "adapt: [{method: lora, target: {}}]", 3, 24, "adapt.0.target",
        "an empty mapping chooses nothing",
    ),
    "adapter path empty": (HEAD + "adapt: [{adapter: ''}]", 3, 19, "adapt.0.adapter", "must not be empty"),
    # base and inputs
    "bad dtype": (
        "version: 1\nbase:\n  model: m\n  dtype: flot16\n", 4, 10, "base.dtype",
        "expected 'float32', 'float16', 'bfloat16' or 'float64', got 'flot16'; did you mean 'float16'?",
    ),
    "no kind of base": (
        "version: 1\nbase:\n  dtype: float16\n", 2, 1, "base",
        "a base needs one of 'model', 'python' or 'program'",
    ),
    "two kinds of base": (
        "version: 1\nbase:\n  program: p.pt2\n  model: m\n", 3, 3, "base.program",
        "a base has one of 'model', 'python' or 'program', and 'model' is given",
    ),
    "factory misspelt": (
        "version: 1\nbase: {python: pkg.mod}\n", 2, 16, "base.python", "must match ",
    ),
    "arguments of a model": (
        "version: 1\nbase: {model: m, args: {w: 1}}\n", 2, 18, "base.args",
        "only a 'python' base takes arguments",
    ),
    "task of a program": (
        "version: 1\nbase: {program: m, task: causal-lm}\n", 2, 20, "base.task",
        "only a 'model' base has a task",
    ),
    "factory without inputs": (
        "version: 1\nbase: {python: 'a:b'}\n", 1, 1, "inputs", "a 'python' base needs its inputs",
    ),
    "input dtype": (
        HEAD + "inputs:\n  ids: int46[batch]\n", 4, 8, "inputs.ids",
        "unknown dtype 'int46'; did you mean 'int64'? known: int64, int32, bool, float32, float16, "
        "bfloat16, float64",
    ),
    "input shape": (
        HEAD + "inputs:\n  ids: int64\n", 4, 8, "inputs.ids",
        "expected a dtype and dimensions such as 'int64[batch, seq]', got 'int64'",
    ),
    "input dimension 0": (
        HEAD + "inputs:\n  ids: int64[batch, 0]\n", 4, 8, "inputs.ids", "a number above 0 (fixed), got '0'",
    ),
    "input dimension missing": (HEAD + "inputs: {ids: 'int64[a,,b]'}", 3, 15, "inputs.ids", "got ''"),
    "input name": (
        HEAD + "inputs:\n  a-b: int64[n]\n",
        4,
        8,
        "inputs.a-b",
        "an input is named after an argument of the model, got 'a-b'",
    ),
    "inputs are a list": (HEAD + "inputs: [x]\n", 3, 9, "inputs", "expected a mapping, got a list"),
    # the rest
    "quantize without a target": (
        HEAD + "quantize:\n  - method: nf4\n", 4, 5, "quantize.0.target", "required, but missing",
    ),
    "unknown scheme": (
        HEAD + "quantize:\n  - {method: nf5, target: all-linear}\n", 4, 14, "quantize.0.method",
        "unknown method 'nf5'; did you mean 'nf4'",
    ),
    "unknown bits": (
        HEAD + "quantize:\n  - {method: gptq, target: all-linear, bits: 3}\n", 4, 46, "quantize.0.bits",
        "expected 2, 4 or 8, got 3",
    ),
    "unknown option of a scheme": (
        HEAD + "quantize:\n  - {method: nf4, target: all-linear, group_size: 64}\n", 4, 39,
        "quantize.0.group_size", "unknown key 'group_size'",
    ),
    "unknown format": (
        HEAD + "emit: [{format: gguf, path: x}]\n", 3, 17, "emit.0.format",
        "unknown format 'gguf'; known: genai, hf, onnx, onnx-adapter, peft, torch",
    ),
    "hf of a python base": (
        PYTHON + "emit:\n- {format: onnx, path: a}\n- {format: hf, path: b}\n", 6, 12, "emit.1.format",
        "a Hugging Face checkpoint needs a 'model' base, and this one is a 'python'",
    ),
    "hf of a program": (
        "version: 1\nbase: {program: m.pt2}\nemit: [{path: b, format: hf}]\n", 3, 26, "emit.0.format",
        "a Hugging Face checkpoint needs a 'model' base, and this one is a 'program'",
    ),
    "shard size": (
        HEAD + "emit: [{format: hf, path: x, max_shard_size: 5 gigs}]\n", 3, 46, "emit.0.max_shard_size",
        "expected a size such as '5GB' or '500MB', got '5 gigs'",
    ),
    "shard size 0": (
        HEAD + "emit: [{format: hf, path: x, max_shard_size: 0GB}]\n", 3, 46, "emit.0.max_shard_size",
        "expected a size such as '5GB' or '500MB', got '0GB'",
    ),
    "shard size without unit": (
        HEAD + "emit: [{format: hf, path: x, max_shard_size: 5}]\n", 3, 46, "emit.0.max_shard_size",
        "expected text, got 5",
    ),
    "no format": (
        HEAD + "emit: [{path: x}]\n", 3, 8, "emit.0", "an entry needs 'format'; its keys are: path",
    ),
    "opset": (
        HEAD + "emit: [{format: onnx, path: x, opset: 26}]\n", 3, 39, "emit.0.opset",
        "must be at most 25, got 26",
    ),
    "adapters": (
        HEAD + "emit: [{format: onnx, path: x, adapters: fold}]\n", 3, 42, "emit.0.adapters",
        "expected 'folded', 'live', 'none', 'swap' or 'rows', got 'fold'; did you mean 'folded'?",
    ),
    "opset of torch": (
        HEAD + "emit: [{format: torch, path: x, opset: 20}]\n", 3, 33, "emit.0.opset", "unknown key 'opset'",
    ),
    "same path twice": (
        HEAD + "emit:\n- {format: torch, path: out}\n- {format: peft, path: ./out}\n", 5, 24, "emit.1.path",
        "emit.0 writes to 'out' too",
    ),
    "empty path": (HEAD + "emit: [{format: torch, path: ' '}]\n", 3, 30, "emit.0.path", "must not be empty"),
    "pass with two names": (
        HEAD + "passes: [a, {b: {}, c: {}}]\n", 3, 13, "passes.1",
        "a pass's name, or one name with its options",
    ),
    # proof
    "proof of nothing": (
        HEAD + "proof: {}\n", 3, 1, "proof",
        "expected inputs, tolerance or shapes, such as proof: {inputs: rows.jsonl}",
    ),
    "proof is text": (HEAD + "proof: rows.jsonl\n", 3, 8, "proof", "expected a mapping, got 'rows.jsonl'"),
    "proof with another key": (
        HEAD + "proof: {input: rows.jsonl}\n", 3, 9, "proof.input",
        "unknown key 'input'; did you mean 'inputs'? known: inputs, tolerance, shapes",
    ),
    "tolerance 0": (
        HEAD + "proof: {tolerance: 0}\n", 3, 20, "proof.tolerance", "must be greater than 0, got 0",
    ),
    "tolerance is text": (
        HEAD + "proof: {tolerance: '1e-4'}\n", 3, 20, "proof.tolerance", "expected a number, got '1e-4'",
    ),
    "size 0": (
        HEAD + "proof:\n  shapes:\n  - {batch: 2, seq: 0}\n", 5, 21, "proof.shapes.0.seq",
        "must be at least 1, got 0",
    ),
    "shapes are no list": (
        HEAD + "proof: {shapes: {batch: 2}}\n", 3, 17, "proof.shapes", "expected a list, got a mapping",
    ),
    "negative seed": (HEAD + "seed: -1\n", 3, 7, "seed", "must be at least 0, got -1"),
    "unknown key": (
        HEAD + "adpt: []\n", 3, 1, "adpt",
        "unknown key 'adpt'; did you mean 'adapt'? known: version, base, inputs, adapt, adapters, quantize, "
        "budget, calibration, proof, emit, passes, plugins, seed",
    ),
    "version missing": ("base: {model: m}\n", 1, 1, "version", "required, but missing"),
    "version is text": ("version: '1'\nbase: {model: m}\n", 1, 10, "version", "expected 1, got '1'"),
    "version 2": (
        "version: 2\nbase: {model: m, new: 1}\n", 1, 10, "version",
        "this adaptc reads version 1, got 2: upgrade adaptc",
    ),
    # the YAML itself
    "tab": (
        "version: 1\nbase:\n\tmodel: m\n", 3, 1, "", "broken YAML: while scanning for the next token, found",
    ),
    "open bracket": ("version: 1\nemit: [1\n", 3, 1, "", "broken YAML: while parsing a flow sequence"),
    "colon twice": ("a: b: c\n", 1, 5, "", "broken YAML: mapping values are not allowed here"),
    "duplicate key": ("version: 1\nseed: 1\nseed: 2\n", 3, 1, "", "duplicate key 'seed'"),
    "duplicate key below": (adapted("r: 8\n    r: 9"), 7, 5, "", "duplicate key 'r'"),
    "python tag": (
        "version: 1\nbase: !!python/object/apply:os.system ['true']\n", 2, 7, "",
        "the tag !!python/object/apply:os.system is not allowed: a spec is plain data",
    ),
    "own tag": ("version: !foo 1\n", 1, 10, "", "the tag !foo is not allowed"),
    "binary tag": ("version: !!binary aGk=\n", 1, 10, "", "the tag !!binary is not allowed"),
    "set tag": ("version: !!set {a}\n", 1, 10, "", "the tag !!set is not allowed"),
    "not an int": ("version: !!int one\n", 1, 10, "", "cannot read 'one' as a number"),
    "two documents": ("version: 1\n---\nversion: 1\n", 2, 1, "", "expected a single document"),
    "list at the root": ("- version: 1\n", 1, 1, "", "a spec is a mapping that starts with 'version: 1'"),
    "empty file": ("", 1, 1, "", "a spec is a mapping that starts with 'version: 1'"),
    "key is a list": ("? [a]\n: 1\n", 1, 3, "", "a key must be a plain word"),
    "merge key": ("version: 1\nbase: {<<: {model: m}}\n", 2, 8, "", "merge keys (<<) are not YAML 1.2"),
    "undefined anchor": ("version: *one\n", 1, 10, "", "found undefined alias 'one'"),
    "anchor in itself": ("version: &a [*a]\n", 1, 10, "", "the anchor 'a' contains itself"),
    "control character": ("version: 1\nseed: \x00\n", 2, 7, "", "character 0x0 is not allowed"),
    "not UTF-8": (b"version: 1\nbase: {model: caf\xe9}\n", 2, 18, "", "not UTF-8: byte 0xe9"),
    "too deep": ("version: " + "[" * 5000, 1, 1, "", "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_PROBLEM)
def test_the_place_and_the_words(tmp_path: Path, case: str) -> None:
    text, line, column, key, words = ONE_PROBLEM[case]
    (problem,) = problems_in(tmp_path, text)
    assert (problem.line, problem.column, problem.key) == (line, column, key)
    assert words in problem.message
    assert problem.file == str(tmp_path / "spec.yaml")


def test_the_line_is_quoted_with_a_caret(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, adapted("r: 0"))
    assert str(problem) == (
        f"{tmp_path}/spec.yaml:6:8: adapt.0.r: must be greater than 0, got 0\n"
        "   6 |     r: 0\n"
        "     |        ^"
    )


def test_an_unlikely_spelling_still_lists_what_is_known(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, adapted("rank: 8"))
    assert problem.message.startswith("unknown key 'rank'; did you mean 'rank_pattern'")
    assert "r, rank_pattern, alpha" in problem.message


def test_tabs_come_with_advice(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, "version: 1\nbase:\n\tmodel: m\n")
    assert problem.notes == ("indent with spaces, not with tabs",)


def test_a_duplicate_names_the_first(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, "version: 1\nseed: 1\nseed: 2\n")
    assert problem.notes == ("first at line 2",)


def test_every_problem_is_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
        seed: x
        emit: [{format: hff}, {format: onnx, path: a, opset: 3}]
        version: 1
        adapt:
          - {method: lora, r: 0, rnak: 4}
          - {method: lorra}
        base: {modle: m}
        """
    found = problems_in(tmp_path, textwrap.dedent(text))
    assert [(p.line, p.key) for p in found] == [
        (1, "seed"),
        (2, "emit.0.format"),
        (2, "emit.1.opset"),
        (5, "adapt.0.target"),
        (5, "adapt.0.r"),
        (5, "adapt.0.rnak"),
        (6, "adapt.1.method"),
        (7, "base.modle"),
    ]


def test_anchors_do_not_grow_without_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (problem,) = problems_in(tmp_path, "\n".join(lines))
    assert "more than 10000 values" in problem.message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("base.dtype=flot16", "base.dtype", "did you mean 'float16'?"),
        ("adapt.0.r=0", "adapt.0.r", "must be greater than 0, got 0"),
        ("adapt.0.rnak=3", "adapt.0.rnak", "unknown key 'rnak'"),
        ("adapt.0.rank_pattern={q: 0}", "adapt.0.rank_pattern.q", "must be greater than 0, got 0"),
        ("adpt.0.r=3", "adpt", "unknown key 'adpt'; did you mean 'adapt'?"),
        ("adapt.7.r=3", "adapt.7.r", "no entry '7' in a list of 1"),
        ("adapt.x=3", "adapt.x", "no entry 'x' in a list of 1"),
        ("version.x=3", "version.x", "cannot set 'x' inside of 1, which is not a mapping"),
        ("version=2", "version", "upgrade adaptc"),
        ("base.dtype=[1", "base.dtype", "broken YAML"),
        (
            "base.dtype=!!python/name:os.system",
            "base.dtype",
            "the tag !!python/name:os.system is not allowed",
        ),
        ("base.dtype", "", "expected a key path, '=' and a value, such as base.dtype=float16"),
        ("base..dtype=x", "", "expected a key path, '=' and a value"),
        ("=x", "", "expected a key path, '=' and a value"),
    ],
)
def test_an_override_is_named_instead_of_a_line(tmp_path: Path, override: str, key: str, words: str) -> None:
    (problem,) = problems_in(tmp_path, LORA, override)
    assert (problem.file, problem.line, problem.key) == (f"--set {override}", None, key)
    assert words in problem.message


def test_the_last_override_of_a_place_is_named(tmp_path: Path) -> None:
    overrides = ["adapt.0.r=4", "adapt=[{method: lora, target: x}]", "adapt.0.r=0"]
    (problem,) = problems_in(tmp_path, LORA, *overrides)
    assert problem.file == "--set adapt.0.r=0"
    (problem,) = problems_in(tmp_path, LORA, "adapt.0.r=4", "adapt=[{method: lora, target: x, r: 0}]")
    assert problem.file == "--set adapt=[{method: lora, target: x, r: 0}]"


def test_an_override_leaves_other_errors_at_their_line(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, adapted("r: 0"), "adapt.0.alpha=3", "seed=4")
    assert (problem.line, problem.column) == (6, 8)


def test_a_new_section_made_by_an_override_is_named(tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path, "version: 1\n", "base.dtype=float16")
    assert (problem.file, problem.key) == ("--set base.dtype=float16", "base")


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.yaml", "cannot be read: no such file"), (".", "cannot be read: is a directory")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path / name)
    (problem,) = caught.value.problems
    assert words in problem.message
    assert problem.file == str(tmp_path / name)


def test_a_mapping_has_no_lines() -> None:
    with pytest.raises(SpecError) as caught:
        load({"adapt": [{"method": "lora", "target": "x", "r": 0}]})
    assert str(caught.value) == "<dict>: adapt.0.r: must be greater than 0, got 0"


def test_keys_of_a_mapping_are_text() -> None:
    with pytest.raises(SpecError, match="a key must be text, got 3"):
        load({3: 4})  # type: ignore[dict-item]


def test_something_else_is_no_spec() -> None:
    with pytest.raises(SpecError, match="expected a file, a mapping or a Spec, got 3"):
        load(3)  # type: ignore[arg-type]


def test_a_base_that_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("# no base\nversion: 1\n")
    with pytest.raises(SpecError) as caught:
        require_base(load(path))
    (problem,) = caught.value.problems
    assert (problem.line, problem.key, problem.message) == (2, "base", "required, but missing")


def test_an_error_found_later_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(LORA)
    (problem,) = load(path).error(("adapt", 0, "target"), "matches nothing", "near: a.b").problems
    assert (problem.line, problem.column, problem.notes) == (5, 13, ("near: a.b",))
    (problem,) = load(path).error(("adapt", 0, "r"), "too large").problems
    assert (problem.line, problem.column, problem.key) == (4, 5, "adapt.0.r")
