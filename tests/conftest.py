"""Settings that must stand before the package is imported, and the small models that tests share."""

import copy
import functools
import os

os.environ.setdefault("PROJECTED_GRPO_CHECK_SHAPES", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
import transformers
from hypothesis import settings
from torch import nn
from transformers import PreTrainedTokenizerBase

from projected_grpo import problems
from projected_grpo.antipasto import Policy, wrap
from projected_grpo.config import TINY_RANDOM, ModelConfig
from projected_grpo.engine.models import load_model
from projected_grpo.problems import Problem, load_problems

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("repeatable")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"head_dim": 6}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", GATED_DELTA),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        GATED_DELTA | {"mlp_only_layers": [0, 1], "num_experts": 0},
    ),
}


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one more than there are cores, as a good part of the time tests wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope="session")
def tiny() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The package's tiny-random model and tokenizer; copy the model before changing it."""
    return load_model(ModelConfig(model=TINY_RANDOM, device="cpu"))


@pytest.fixture
def unchecked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts do not check shapes, which triples their imports: it is done in here."""
    monkeypatch.setenv("PROJECTED_GRPO_CHECK_SHAPES", "0")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No checks of shapes, a third of a short run's time: for runs of what other tests run with them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def packaged_problems_once() -> Iterator[None]:
    """The packaged problems are read once: nano's take seconds to draw, and every run asks for some."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_embedded", "_nano"):
            read = getattr(problems, name)
            patch.setattr(problems, name, functools.cache(lambda read=read: tuple(read())))
        yield


@pytest.fixture(scope="session")
def nano_problems() -> tuple[Problem, ...]:
    """The problems of the nano model, whose tests take seconds to draw."""
    found = load_problems("nano")
    assert found.left_out == ()
    return found.problems


@pytest.fixture(scope="session")
def svd_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("svd_cache")


@pytest.fixture
def tiny_policy(tiny: tuple[nn.Module, PreTrainedTokenizerBase], svd_cache: Path) -> Policy:
    """A fresh tiny-random policy, adapter parameters at zero."""
    return wrap(copy.deepcopy(tiny[0]), svd_cache)


@pytest.fixture(scope="session")
def small_model() -> Callable[..., nn.Module]:
    """Build a two-layer transformers model of a family, by default in float64, the same at every call."""

    def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
        model_class, config_class, extra = FAMILIES[family]
        if not hasattr(transformers, config_class):
            pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
        config = getattr(transformers, config_class)(**SMALL | extra)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = getattr(transformers, model_class)(config)
        if dtype == torch.float64:
            compute_norms_in_float64(model)
        return model.to(dtype).eval()

    return build


def compute_norms_in_float64(model: nn.Module) -> None:
    """transformers' RMSNorm works in float32 whatever its dtype, too coarse for finite differences."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Qwen3RMSNorm", "Qwen2RMSNorm", "LlamaRMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            model.set_submodule(name, norm)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it are skipped where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return SHARED_DATA
