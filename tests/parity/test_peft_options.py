"""Every option of every PEFT configuration that adaptc reads: it computes what PEFT does, or the option is named.

The options are those of the installed PEFT. One that a later PEFT adds has no row here and fails until it has one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.checkpoints.adapter import read
from adaptc.checkpoints.config_file import CommonKeys
from adaptc.checkpoints.peft_config import declared
from adaptc.errors import AdaptcError
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from tests.families import Zoo, close, inputs, outputs, perturb, without_cache

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about most of these values

CONFIGS: dict[str, Any] = {kind.value: cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
FORMATS: dict[str, list[Any]] = {}
for _cls in METHODS.values():
    if _cls.peft is not None and _cls.peft.type:
        FORMATS.setdefault(_cls.peft.type, []).append(_cls.peft)
TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 9, "lora_alpha": 6},
    "BOFT": {},
    "C3A": {"block_size": 8},
    "DELORA": {"r": 4, "delora_lambda": 9},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 4, "alpha": 6},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["dense"]},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "LOHA": {"r": 4, "alpha": 6},
    "LOKR": {"r": 2, "alpha": 6},
    "LORA": {"r": 4, "lora_alpha": 6},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2, "random_seed": 1},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5, 7], "target_modules": ["word_embeddings"]},
    "VBLORA": {"r": 2, "vector_length": 8, "num_vectors": 10},
    "VERA": {"r": 8},
    **{kind: {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"} for kind in TOKENS},
}
"""Options with which each type fits the small bases."""
EDITED: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "Model", "parent_library": "library"},
    "base_model_name_or_path": "elsewhere/model",
    "revision": "main",
    "inference_mode": False,
    "peft_version": "99.0",
}
"""Options that say where an adapter comes from: all are changed in the file at once."""


@dataclass(frozen=True)
class Row:
    """Values of an option other than its default.

    Attributes:
        applied: with these, outputs are those of PEFT.
        refused: these are refused by the option's name.
    """

    applied: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()


LAYERS = Row(([0], 1, []), ("first", [0.5]))
ROWS: dict[str | tuple[str, str], Row] = {
    # where it sits
    "target_modules": Row(
        (["attention.self.query", "attention.output.dense"], r".*layer\.1.*(query|value|\.output\.dense)"), (4, [0])
    ),
    ("IA3", "target_modules"): Row((["query", "dense"],), (4, [0])),
    ("LN_TUNING", "target_modules"): Row((["output.LayerNorm"], r".*layer\.1.*LayerNorm"), (4, [0])),
    ("TRAINABLE_TOKENS", "target_modules"): Row((r".*position_embeddings",), (4, [0])),
    "exclude_modules": Row((["layer.0.attention.self.query"], r".*layer\.1\.attention.*"), (4, [0])),
    ("LN_TUNING", "exclude_modules"): Row((["layer.0.output.LayerNorm"],), (4, [0])),
    "fan_in_fan_out": Row((True,), ("yes",)),
    "modules_to_save": Row((["classifier"],), (4, [0], "classifier", {"classifier": 1})),
    "layers_to_transform": LAYERS,
    "layers_pattern": Row((None, "", []), ("layer", ["layer"], 4)),
    "target_parameters": Row((["layer.0.attention.self.key.weight"],), ("key.weight", 4)),
    ("ADALORA", "target_parameters"): Row((), (4,)),  # this PEFT raises an error
    "peft_type": Row((), ("NO_SUCH", 4, None)),
    "task_type": Row(("FEATURE_EXTRACTION", "TOKEN_CLS"), (4,)),
    **{(kind, "task_type"): Row((), (4,)) for kind in (*TOKENS, "TRAINABLE_TOKENS")},
    # the rank and its kin
    "r": Row((6,), ("8", 0, None, 1.5)),
    ("OFT", "r"): Row((), ("8", -1)),
    ("MISS", "r"): Row((4,), ("8", 0)),
    ("ADALORA", "r"): Row((5,)),
    "rank_pattern": Row(({"query": 2}, {r"layer\.0\..*dense": 6}), ({"query": 0}, [2])),
    ("ADALORA", "rank_pattern"): Row((None,), ({"query": 2}, [2])),
    ("HIRA", "rank_pattern"): Row(({},), ({"query": 0}, [2])),
    "alpha_pattern": Row(({"query": 3}, {r"layer\.0\..*dense": 16}), ({"query": "x"}, [2])),
    ("ADALORA", "alpha_pattern"): Row(({},), ({"query": 3},)),
    "lambda_pattern": Row(({"query": 3},), ({"query": "x"},)),
    "block_size_pattern": Row(({"query": 4},), ({"query": 0},)),
    "n_frequency_pattern": Row(({"query": 20},), ({"query": 0},)),
    "init_r": Row((4,), (0,)),
    "total_step": Row((20,), ("x",)),
    **{name: Row((1,), (-1,)) for name in ("tinit", "tfinal")},
    **{name: Row((0.5,), (2,)) for name in ("beta1", "beta2")},
    "target_r": Row((2,), (0,)),
    "mini_r": Row((4,), (0,)),
    "vector_length": Row((4,), (0,)),
    "num_vectors": Row((12,), (0,)),
    "topk": Row((3,), (0,)),
    "block_size": Row((4,), (0,)),
    "group_size": Row((4,), (0,)),
    "gralora_k": Row((4,), (0,)),
    "n_frequency": Row((30,), (0,)),
    "decompose_factor": Row((4,), ("x",)),
    "hybrid_r": Row((2,), (-1,)),
    "boft_block_size": Row((8,), (-1,)),
    "boft_block_num": Row((0,), (-1,)),
    "boft_n_butterfly_factor": Row((1, 0)),  # without CUDA PEFT trains one, whatever it is given
    "oft_block_size": Row((4,), (-1,)),
    "num_cayley_neumann_terms": Row((3,), (0,)),
    "variant": Row(("road_2", "road_4"), ("road_9",)),
    "feedforward_modules": Row((["value"], r".*output\.dense"), (4,)),
    "projection_prng_key": Row((3,), ("x",)),
    "mask_type": Row(("random",)),
    "random_seed": Row((3,), ("x",)),
    "random_loc_seed": Row((3,), (None,)),
    "token_indices": Row(([2, 4, 6, 8],), ("x", ["x"])),
    # what is trained beside it
    "bias": Row((), ("all", "lora_only", "boft_only", 4)),
    ("LORA", "bias"): Row(("all", "lora_only"), ("boft_only", 4)),
    "trainable_token_indices": Row(([1, 5], {"word_embeddings": [1, 5]}), ("x", ["x"], {"word_embeddings": 4})),
    # how it started
    "init_lora_weights": Row(
        (False, "gaussian", "eva", "olora", "pissa", "orthogonal", "mica"),
        ("pissa_niter_4", "corda", "loftq", "lora_ga", "of_2031"),
    ),
    ("ADALORA", "init_lora_weights"): Row((False, "gaussian", "pissa")),
    "init_weights": Row((False,), ("of_2031", 4)),
    ("C3A", "init_weights"): Row((True, False, "gaussian", "kaiming_uniform"), ("of_2031",)),
    ("FOURIERFT", "init_weights"): Row((True,), ("of_2031",)),
    ("HIRA", "init_weights"): Row((False, "gaussian"), ("of_2031",)),
    ("LOKR", "init_weights"): Row((False, "lycoris"), ("of_2031",)),
    ("MISS", "init_weights"): Row(("bat", "mini"), ("of_2031",)),
    ("PREFIX_TUNING", "init_weights"): Row(("zero",), ("of_2031",)),
    "init_ia3_weights": Row((False,), ("of_2031",)),
    "eva_config": Row((peft.EvaConfig(),)),
    "corda_config": Row((peft.tuners.lora.config.CordaConfig(),)),
    "lora_ga_config": Row((peft.tuners.lora.config.LoraGAConfig(),)),
    "loftq_config": Row(({"loftq_bits": 4, "loftq_iter": 1},)),
    # variants of LoRA
    "use_dora": Row((True,), ("yes",)),
    ("ADALORA", "use_dora"): Row((), (True,)),
    ("ADALORA", "use_rslora"): Row((), (True,)),
    ("ADALORA", "lora_bias"): Row((), (True,)),
    "use_qalora": Row((), (True,)),
    **{
        name: Row((), ({"some": 1},))
        for name in (
            *("megatron_config", "velora_config", "monteclora_config", "arrow_config", "kasa_config"),
            "use_bdlora",
        )
    },
    "alora_invocation_tokens": Row((), ([1, 2],)),
    "layer_replication": Row(([],), ([[0, 2], [1, 2]],)),
    "megatron_core": Row(("other.core", None)),
    "runtime_config": Row((peft.tuners.lora.config.LoraRuntimeConfig(ephemeral_gpu_offload=True),)),
    "save_only_topk_weights": Row((), (True,)),
    # virtual tokens
    "num_virtual_tokens": Row((2,), (0, "x")),
    "num_transformer_submodules": Row((1,), (3,)),
    "token_dim": Row((), (8, "x")),
    **{name: Row((1,), ("x",)) for name in ("num_attention_heads", "num_layers")},
    **{("PREFIX_TUNING", name): Row((), (1, "x")) for name in ("num_attention_heads", "num_layers")},
    "prompt_tuning_init": Row(("SAMPLE_VOCAB",)),
    **{name: Row(("some",)) for name in ("prompt_tuning_init_text", "tokenizer_name_or_path")},
    "tokenizer_kwargs": Row((None,)),
    "encoder_hidden_size": Row((8,)),
    "encoder_num_layers": Row((1,)),
    "encoder_reparameterization_type": Row(("LSTM",)),
}  # fmt: skip


def row(kind: str, option: dataclasses.Field[Any]) -> Row:
    """The row of an option; for a switch and a number, other values follow from the default."""
    name, default = option.name, option.default
    given = ROWS.get((kind, name)) or ROWS.get(name)
    if given is not None:
        return given
    idle = all(name in format.ignored for format in FORMATS[kind])
    if isinstance(default, bool):
        return Row((not default,), () if idle else ("yes",))
    if isinstance(default, int | float):
        return Row((2 * default if default else 0.3,), () if idle else ("x",))
    pytest.fail(f"PEFT {peft.__version__} has an option of {kind} that no row is for: {name} ({option.type})")


def options_of(kind: str) -> list[Any]:
    return [option for option in dataclasses.fields(CONFIGS[kind]) if option.name not in EDITED]


EVERY = [(kind, option) for kind in OPTIONS for option in options_of(kind)]
QUICK = {
    ("LORA", name)
    for name in ("use_rslora", "exclude_modules", "trainable_token_indices", "init_lora_weights")
}


def cases(values: Callable[[Row], tuple[Any, ...]], quick: Callable[[str, str], bool]) -> list[Any]:
    return [
        pytest.param(
            kind, option.name, value, marks=[pytest.mark.slow] * (not quick(kind, option.name)),
            id=f"{kind}-{option.name}-{number}",
        )
        for kind, option in EVERY
        for number, value in enumerate(values(row(kind, option)))
    ]  # fmt: skip


class Bench:
    """Adapters of every type on the zoo's models, in PEFT and in adaptc."""

    def __init__(self, zoo: Zoo, root: Path) -> None:
        self.zoo, self.root = zoo, root
        self._plain: dict[str, Path] = {}

    def base(self, kind: str) -> str:
        return "llama" if kind in TOKENS else "bert"

    def train(self, kind: str, directory: Path, **options: Any) -> None:
        """Save an adapter as if trained."""
        target = {} if kind in TOKENS else {"target_modules": ["query", "value", "dense"]}
        torch.manual_seed(0)
        config = CONFIGS[kind](**target | OPTIONS[kind] | options)
        model = peft.get_peft_model(self.zoo.fresh(self.base(kind)), config)
        perturb(model)
        model.save_pretrained(str(directory))

    def plain(self, kind: str) -> Path:
        """An adapter of a type with no other option than its base needs."""
        if kind not in self._plain:
            self._plain[kind] = self.root / kind
            self.train(kind, self._plain[kind])
        return self._plain[kind]

    def edited(self, kind: str, directory: Path, **options: Any) -> Path:
        """The same with other values in its configuration."""
        shutil.copytree(self.plain(kind), directory)
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))
        return directory

    def check(self, kind: str, directory: Path) -> None:
        """An adapter gives PEFT's outputs."""
        name = self.base(kind)
        x = inputs(name, 2, 7, pad=True)
        theirs = peft.PeftModel.from_pretrained(self.zoo.fresh(name), str(directory)).eval()
        ours = bind(self.zoo.compiled(name, [{"adapter": str(directory)}]).live_graph()).eval()
        with torch.no_grad():
            got = outputs(ours, x, ["logits"])["logits"]
            want = theirs(**x, **without_cache(theirs.get_base_model()))["logits"]
        close(got, want[:, -got.shape[1] :] if got.dim() > 2 else want)

    def refusal(self, kind: str, directory: Path) -> str:
        """The words with which an adapter is refused."""
        try:
            declared(read(directory))  # what needs no base
            self.zoo.compiled(self.base(kind), [{"adapter": str(directory)}])
        except AdaptcError as error:
            return str(error)
        return pytest.fail("it was not refused")


@pytest.fixture(scope="module")
def bench(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(zoo, tmp_path_factory.mktemp("options"))


def test_every_type_that_adaptc_reads_has_a_row() -> None:
    assert OPTIONS.keys() == FORMATS.keys()


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_of_peft_is_known(kind: str) -> None:
    """Read, of no effect, or refused at other values than those that say nothing."""
    for format in FORMATS[kind]:
        known = {*CommonKeys.model_fields, *format.keys, *format.ignored, *format.neutral_values}
        assert {option.name for option in dataclasses.fields(CONFIGS[kind])} - known == set()


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_of_peft_is_at_rest_at_its_default(kind: str) -> None:
    """What PEFT writes into every file is refused in none."""
    for option in dataclasses.fields(CONFIGS[kind]):
        for format in FORMATS[kind]:
            if option.name in format.neutral_values and option.default is not dataclasses.MISSING:
                assert option.default in format.neutral_values[option.name], option.name


@pytest.mark.parametrize(
    ("kind", "option", "value"), cases(lambda row: row.applied, lambda *case: case in QUICK)
)
def test_an_option_is_applied_or_without_effect(
    bench: Bench, tmp_path: Path, kind: str, option: str, value: Any
) -> None:
    bench.train(kind, tmp_path / "adapter", **{option: value})
    bench.check(kind, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("kind", "option", "value"), cases(lambda row: row.refused, lambda kind, _: kind == "LORA")
)
def test_an_option_is_refused_by_its_name(
    bench: Bench, tmp_path: Path, kind: str, option: str, value: Any
) -> None:
    text = bench.refusal(kind, bench.edited(kind, tmp_path / "adapter", **{option: value}))
    assert f"{option}:" in text or f"{option}." in text, text


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_where_an_adapter_comes_from_has_no_effect(bench: Bench, tmp_path: Path, kind: str) -> None:
    bench.check(kind, bench.edited(kind, tmp_path / "adapter", **EDITED))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_what_a_file_leaves_out_is_pefts_default(bench: Bench, tmp_path: Path, kind: str) -> None:
    directory = bench.edited(kind, tmp_path / "adapter")
    file = directory / "adapter_config.json"
    defaults = {
        option.name: option.default
        if option.default_factory is dataclasses.MISSING
        else option.default_factory()
        for option in dataclasses.fields(CONFIGS[kind])
    }
    config = json.loads(file.read_text())
    shorter = {k: v for k, v in config.items() if k == "peft_type" or defaults.get(k, "none") != v}
    assert len(shorter) < len(config)
    file.write_text(json.dumps(shorter))
    bench.check(kind, directory)
