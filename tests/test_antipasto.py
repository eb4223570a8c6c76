"""The adapter: exact per-rollout gradients, exact identity, and a cache that cannot give a wrong basis."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jaxtyping
import pytest
import torch
from loguru import logger
from torch import Tensor, nn

from projected_grpo import tensor_files
from projected_grpo.antipasto import TARGETS, AdaptedLinear, Policy, merged_weight, wrap
from projected_grpo.engine.tangent import rows
from projected_grpo.errors import UserError
from projected_grpo.tensor_files import compute_svd, load_svd

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
DELTA_NET_NEXT = ("in_proj_qkvz", "in_proj_ba", "out_proj")


class Block(nn.Module):
    """One input feeds q, k and v (causal attention), then o, then a gated MLP, as in a transformer."""

    def __init__(self, width: int = 10, head: int = 7, hidden: int = 13) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, head)
        self.k_proj = nn.Linear(width, head, bias=False)
        self.v_proj = nn.Linear(width, head)
        self.o_proj = nn.Linear(head, width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        x = x + self.o_proj(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v)
        return self.other(x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


Task = tuple[Policy, Callable[[slice], Tensor]]  # a policy, and the loss per rollout of a slice of the inputs


def tree_task() -> Task:
    torch.manual_seed(0)
    policy = wrap(Tree().double(), None)
    x, target = torch.randn(2, 4, 6, 10, dtype=torch.float64)

    def losses(which: slice) -> Tensor:
        return (policy.model(x[which]) * target[which]).tanh().sum((1, 2))

    return policy, losses


def language_task(model: nn.Module) -> Task:
    policy = wrap(model, None)
    ids = torch.randint(48, (4, 9), generator=torch.Generator().manual_seed(1))

    def losses(which: slice) -> Tensor:
        logits = policy.model(input_ids=ids[which]).logits[:, :-1]
        return -torch.log_softmax(logits, -1).gather(-1, ids[which, 1:, None]).sum((1, 2))

    return policy, losses


def random_deltas(policy: Policy, scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        m: scale * torch.randn(r, generator=generator, dtype=policy.layers[m].delta_s.dtype)
        for m, r in policy.ranks.items()
    }


def leaf_gradients(task: Task, deltas: Mapping[str, Tensor], which: slice) -> dict[str, Tensor]:
    policy, losses = task
    leaves = {m: d.clone().requires_grad_() for m, d in deltas.items()}
    with policy.bind(leaves):
        found = torch.autograd.grad(losses(which).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def assert_rows_are_single_gradients(task: Task, scale: float, relative: float) -> None:
    policy, _ = task
    deltas = random_deltas(policy, scale)
    rows = leaf_gradients(task, {m: d.expand(4, -1) for m, d in deltas.items()}, slice(0, 4))
    singles = [leaf_gradients(task, deltas, slice(i, i + 1)) for i in range(4)]
    shared = leaf_gradients(task, deltas, slice(0, 4))
    for m in policy.layers:
        size = float(shared[m].norm()) + float(rows[m].norm())
        assert size > 0, m
        for i in range(4):
            torch.testing.assert_close(rows[m][i], singles[i][m], rtol=relative, atol=relative * size)
        torch.testing.assert_close(rows[m].sum(0), shared[m], rtol=relative, atol=relative * size)
        assert float((rows[m][0] - rows[m][1]).norm()) > 1e-3 * float(rows[m][0].norm())


# Per-rollout gradients


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_rows_hold_each_rollouts_own_gradient_where_one_input_feeds_several_linears(scale):
    assert_rows_are_single_gradients(tree_task(), scale, 1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize(
    ("family", "relative"),
    [
        ("qwen3", 1e-9),
        ("qwen2", 1e-9),
        ("llama", 1e-9),
        ("qwen3_5", 1e-5),  # the gated delta rule computes in float32 inside
        ("qwen3_next", 1e-5),
    ],
)
def test_rows_hold_each_rollouts_own_gradient_in_transformers_models(small_model, family, relative, scale):
    assert_rows_are_single_gradients(language_task(small_model(family)), scale, relative)


def test_the_gradient_at_zero_is_the_slope_of_the_loss():
    task = tree_task()
    policy, losses = task
    rows = leaf_gradients(task, {m: torch.zeros(4, r).double() for m, r in policy.ranks.items()}, slice(0, 4))
    for m, j in (("blocks.0.k_proj", 2), ("blocks.1.down_proj", 5)):
        values = []
        for step in (1e-6, -1e-6):
            deltas = {n: torch.zeros(r).double() for n, r in policy.ranks.items()}
            deltas[m][j] = step
            with policy.bind(deltas):
                values.append(losses(slice(0, 4)).detach())
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(rows[m][:, j], slope, rtol=1e-5, atol=1e-7)


def test_each_row_acts_on_its_own_rollout_only():
    policy, losses = tree_task()
    generator = torch.Generator().manual_seed(5)
    rows = {m: 0.3 * torch.randn(4, r, generator=generator).double() for m, r in policy.ranks.items()}
    with policy.bind(rows):
        together = losses(slice(0, 4))
    for i in range(4):
        with policy.bind({m: d[i] for m, d in rows.items()}):
            torch.testing.assert_close(losses(slice(i, i + 1))[0], together[i], rtol=1e-11, atol=1e-11)


def test_only_the_adapter_is_trainable_and_bind_leaves_no_gradient_on_it():
    task = tree_task()
    policy, _ = task
    trainable = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.{parameter}" for m in policy.layers for parameter in ("delta_s", "delta_hack")}
    leaf_gradients(task, random_deltas(policy), slice(0, 4))
    assert all(p.grad is None for p in policy.model.parameters())


def test_rows_for_another_number_of_rollouts_or_a_flattened_input_are_refused():
    policy, losses = tree_task()
    rows = {m: torch.zeros(3, r).double() for m, r in policy.ranks.items()}
    with pytest.raises(ValueError, match="3 rollouts"), policy.bind(rows):
        losses(slice(0, 4))
    layer = policy.layers["blocks.0.q_proj"]
    with pytest.raises(ValueError, match="rollouts"), policy.bind(rows):
        layer(torch.zeros(3, 10).double())


# Which Linears


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *(
            (f, [f"{i}.{leaf}" for i in (0, 1) for leaf in ATTENTION + MLP])
            for f in ("qwen3", "qwen2", "llama")
        ),
        (
            "qwen3_5",
            [f"0.linear_attn.{leaf}" for leaf in DELTA_NET]
            + [f"1.{leaf}" for leaf in ATTENTION]
            + [f"{i}.{leaf}" for i in (0, 1) for leaf in MLP],
        ),
        (
            "qwen3_next",
            [f"0.linear_attn.{leaf}" for leaf in DELTA_NET_NEXT]
            + [f"1.{leaf}" for leaf in ATTENTION]
            + [f"{i}.{leaf}" for i in (0, 1) for leaf in MLP],
        ),
    ],
)
def test_every_projection_of_each_family_is_adapted_and_nothing_else(small_model, family, expected):
    told: list[str] = []
    model = small_model(family)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    policy = wrap(model, None, told.append)
    assert set(policy.layers) == {f"model.layers.{name}" for name in expected}
    assert told == list(policy.layers)
    assert policy.ranks == {m: min(shapes[f"{m}.weight"]) for m in policy.layers}
    for m, layer in policy.layers.items():
        assert model.get_submodule(m) is layer


def test_a_model_without_targets_is_the_users_error_in_one_line():
    with pytest.raises(UserError) as caught:
        wrap(nn.Sequential(nn.Linear(3, 3)), None)
    assert "\n" not in str(caught.value) and "q_proj" in str(caught.value)


def test_the_custom_tree_keeps_its_other_linear():
    policy = wrap(Tree(), None)
    assert all(name.rpartition(".")[2] in TARGETS for name in policy.layers)
    assert isinstance(policy.model.get_submodule("blocks.0.other"), nn.Linear)


# Identity, reference, deployment


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.randint(48, (2, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3_5"])
def test_a_zero_adapter_is_exactly_the_base_model(small_model, family, dtype):
    base = logits_of(small_model(family, dtype))
    policy = wrap(small_model(family, dtype), None)
    assert torch.equal(logits_of(policy.model), base)
    with policy.bind(policy.deltas()):
        assert torch.equal(logits_of(policy.model), base)
    with policy.bind({m: torch.zeros(2, r) for m, r in policy.ranks.items()}):
        assert torch.equal(logits_of(policy.model), base)
    with policy.merge(policy.deltas()):
        assert torch.equal(logits_of(policy.model), base)


def test_binding_nothing_is_the_reference_whatever_the_adapter_is(small_model):
    base = logits_of(small_model("qwen3"))
    policy = wrap(small_model("qwen3"), None)
    set_adapter(policy)
    with policy.bind(None):
        assert torch.equal(logits_of(policy.model), base)
    with policy.bind(policy.deltas()):
        assert not torch.allclose(logits_of(policy.model), base, atol=1e-3)
    assert torch.equal(logits_of(policy.model), base)


def set_adapter(policy: Policy, hack: float = 0.4) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.delta_s.copy_(0.4 * torch.randn(layer.delta_s.shape, generator=generator))
            layer.delta_hack.copy_(hack * torch.randn(layer.delta_s.shape, generator=generator))


def test_the_layer_is_its_equation():
    torch.manual_seed(0)
    base = nn.Linear(5, 3).double()
    policy = wrap(nn.ModuleDict({"q_proj": base}), None)
    layer = policy.layers["q_proj"]
    set_adapter(policy)
    x = torch.randn(2, 4, 5).double()
    U, S, Vh = torch.linalg.svd(base.weight.double(), full_matrices=False)
    delta = layer.delta_s + layer.delta_hack
    expected = x @ (U @ torch.diag(S + delta) @ Vh).T + base.bias
    with policy.bind(policy.deltas()):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.weight is base.weight


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_ablating_the_quarantine_is_the_model_with_delta_hack_at_zero(small_model, family):
    policy = wrap(small_model(family), None)
    set_adapter(policy)
    with policy.bind(policy.deltas(ablate_quarantine=True)):
        deployed = logits_of(policy.model)
    with policy.bind(policy.deltas()):
        trained = logits_of(policy.model)
    for layer in policy.layers.values():
        layer.delta_hack.data.zero_()
    with policy.bind(policy.deltas()):
        assert torch.equal(logits_of(policy.model), deployed)
    assert not torch.allclose(trained, deployed, atol=1e-3)


def test_deltas_are_copies_without_a_graph(tiny_policy):
    set_adapter(tiny_policy)
    for ablate in (False, True):
        deltas = tiny_policy.deltas(ablate_quarantine=ablate)
        for m, layer in tiny_policy.layers.items():
            expected = layer.delta_s + (0 if ablate else layer.delta_hack)
            assert torch.equal(deltas[m], expected) and not deltas[m].requires_grad
            deltas[m].add_(1)
            assert not torch.equal(deltas[m], layer.delta_s + (0 if ablate else layer.delta_hack))


# Merged weights


@pytest.mark.parametrize(("family", "atol"), [("qwen3", 1e-10), ("llama", 1e-10), ("qwen3_5", 1e-4)])
def test_merged_and_bound_models_agree(small_model, family, atol):
    policy = wrap(small_model(family), None)
    set_adapter(policy)
    deltas = policy.deltas()
    base = logits_of(policy.model)
    with policy.bind(deltas):
        bound = logits_of(policy.model)
    with policy.merge(deltas):
        merged = logits_of(policy.model)
    torch.testing.assert_close(merged, bound, rtol=1e-7, atol=atol)
    assert float((merged - base).abs().max()) > 0.01


@pytest.mark.parametrize("fails", [False, True])
def test_merge_puts_the_very_same_weights_back(small_model, fails):
    policy = wrap(small_model("qwen3", torch.bfloat16), None)
    set_adapter(policy)
    before = {m: layer.base.weight.data for m, layer in policy.layers.items()}
    copies = {m: w.clone() for m, w in before.items()}
    try:
        with policy.merge(policy.deltas()):
            assert all(not torch.equal(x.base.weight, copies[m]) for m, x in policy.layers.items())
            if fails:
                raise RuntimeError("while decoding")
    except RuntimeError:
        assert fails
    for m, layer in policy.layers.items():
        assert layer.base.weight.data_ptr() == before[m].data_ptr()
        assert torch.equal(layer.base.weight, copies[m])


def test_a_merge_that_fails_half_way_puts_back_what_it_had_merged(small_model):
    policy = wrap(small_model("qwen3"), None)
    set_adapter(policy)
    base = logits_of(policy.model)
    deltas = policy.deltas()
    deltas.pop(list(deltas)[-1])
    with pytest.raises(KeyError), policy.merge(deltas):
        pass
    assert torch.equal(logits_of(policy.model), base)
    with pytest.raises(KeyError), policy.bind(deltas):
        pass
    assert torch.equal(logits_of(policy.model), base)


def test_bind_is_undone_when_the_body_raises(small_model):
    policy = wrap(small_model("qwen3"), None)
    set_adapter(policy)
    base = logits_of(policy.model)
    with pytest.raises(RuntimeError), policy.bind(policy.deltas()):
        raise RuntimeError("inside")
    assert torch.equal(logits_of(policy.model), base)


def test_rows_leave_nothing_merged_or_bound_when_the_body_raises(small_model):
    policy = wrap(small_model("qwen3"), None)
    set_adapter(policy)
    base = logits_of(policy.model)
    with pytest.raises(RuntimeError), rows(policy, policy.deltas(), policy.merged(policy.deltas()), 2):
        raise RuntimeError("inside")
    assert torch.equal(logits_of(policy.model), base)
    assert not any(layer.fast or layer.bound != (None, None) for layer in policy.layers.values())


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_5", "qwen3_next"])
def test_rows_around_merged_weights_have_the_gradients_of_unmerged_ones(small_model, family):
    """At deltas that are not zero, and with every row's own upstream gradient."""
    policy = wrap(small_model(family, torch.float64), None)
    set_adapter(policy)
    ids = torch.arange(3 * 7).view(3, 7) % 40
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradients(leaves):
        logp = policy.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 5]
        return torch.autograd.grad((logp * weights).sum(), list(leaves.values()))

    deltas = policy.deltas()
    assert all(bool(d.any()) for d in deltas.values())
    unmerged = {m: d.expand(3, -1).clone().requires_grad_() for m, d in deltas.items()}
    with policy.bind(unmerged):
        slow = gradients(unmerged)
    with rows(policy, deltas, policy.merged(deltas), 3) as leaves:
        assert not any(bool(leaf.any()) for leaf in leaves.values())
        fast = gradients(leaves)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
        assert bool(a.any())


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_delta_of_another_rank_is_refused(rank):
    policy = wrap(nn.ModuleDict({"q_proj": nn.Linear(5, 5)}), None)
    wrong = {"q_proj": torch.ones(rank)}
    with pytest.raises(jaxtyping.TypeCheckError), policy.bind(wrong):
        pass
    with pytest.raises(jaxtyping.TypeCheckError), policy.bind({"q_proj": torch.ones(2, rank)}):
        pass
    with pytest.raises(jaxtyping.TypeCheckError), policy.merge(wrong):
        pass
    with pytest.raises(jaxtyping.TypeCheckError):
        merged_weight(policy.layers["q_proj"], torch.ones(2, 5))


# The SVD and its cache


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_basis_is_orthonormal_and_rebuilds_the_weight(shape, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    svd = compute_svd(W)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = 1e-12 if wide == torch.float64 else 1e-5
    eye = torch.eye(min(shape), dtype=wide)
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == wide
    torch.testing.assert_close(svd.U.T @ svd.U, eye, rtol=0, atol=eps)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, eye, rtol=0, atol=eps)
    torch.testing.assert_close(svd.U @ torch.diag(svd.S) @ svd.Vh, W.to(wide), rtol=0, atol=eps)
    assert bool((svd.S.diff() <= 0).all()) and bool((svd.S >= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_adapter_is_float32_and_the_basis_has_the_weights_dtype(small_model, dtype):
    policy = wrap(small_model("qwen3", dtype), None)
    for layer in policy.layers.values():
        assert layer.delta_s.dtype == layer.delta_hack.dtype == torch.float32
        assert layer.U.dtype == layer.Vh.dtype == layer.base.weight.dtype == dtype
        assert not layer.delta_s.any() and not layer.delta_hack.any()
    assert not any("U" in name.split(".") for name in policy.model.state_dict())


@pytest.fixture
def warnings() -> list[str]:
    said: list[str] = []
    handle = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    yield said
    logger.remove(handle)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights whose SVD was computed rather than read."""
    shapes: list[tuple[int, ...]] = []

    def counting(W: Tensor) -> tensor_files.SVD:
        shapes.append(tuple(W.shape))
        return compute_svd(W)

    monkeypatch.setattr(tensor_files, "compute_svd", counting)
    return shapes


def weight(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_basis(a: tensor_files.SVD, b: tensor_files.SVD, dtype: torch.dtype) -> bool:
    return (
        torch.equal(a.U.to(dtype), b.U.to(dtype))
        and torch.equal(a.Vh.to(dtype), b.Vh.to(dtype))
        and torch.equal(a.S, b.S)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_second_load_reads_the_file(tmp_path: Path, computed, warnings, dtype):
    W = weight(0, dtype)
    first = load_svd(W, tmp_path / "deep" / "cache")
    (file,) = (tmp_path / "deep" / "cache").iterdir()
    written = file.stat().st_mtime_ns
    second = load_svd(W.clone(), tmp_path / "deep" / "cache")
    assert computed == [(8, 6)] and not warnings
    assert file.stat().st_mtime_ns == written
    assert same_basis(first, second, dtype)
    assert list((tmp_path / "deep" / "cache").iterdir()) == [file]  # no temporary file stays


def test_weights_that_differ_in_one_bit_or_in_shape_have_files_of_their_own(tmp_path: Path, computed):
    W = weight(0)
    nudged = W.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(math.inf))
    for variant in (W, nudged, W.reshape(6, 8), W.double()):
        load_svd(variant, tmp_path)
    assert len(computed) == len(list(tmp_path.iterdir())) == 4


def truncate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path, other: Path) -> None:
    file.write_bytes(bytes(range(256)) * 8)


def foreign(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def flip_a_tensor_bit(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def flip_a_metadata_byte(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"projected_grpo.svd/1", b"projected_grpo.svd/0"))


@pytest.mark.parametrize(
    "damage", [truncate, empty, garbage, foreign, flip_a_tensor_bit, flip_a_metadata_byte]
)
def test_a_damaged_or_foreign_file_is_rebuilt_with_a_warning(tmp_path: Path, computed, warnings, damage):
    W = weight(0)
    right = load_svd(W, tmp_path)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    load_svd(weight(1), tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    damage(file, other)
    assert file.read_bytes() != intact
    computed.clear()
    assert same_basis(load_svd(W, tmp_path), right, W.dtype)
    assert computed == [(8, 6)]
    assert len(warnings) == 1 and file.name in warnings[0]
    assert same_basis(load_svd(W, tmp_path), right, W.dtype)
    assert computed == [(8, 6)] and len(warnings) == 1  # the new file is good
    assert set(tmp_path.iterdir()) == {file, other}


def test_a_cached_and_an_uncached_policy_are_the_same(tmp_path: Path, small_model, computed):
    model = small_model("qwen2", torch.bfloat16)
    policies = [wrap(copy.deepcopy(model), folder) for folder in (None, tmp_path, tmp_path)]
    assert len(computed) == 2 * len(policies[0].layers)
    outputs = []
    for policy in policies:
        set_adapter(policy)
        with policy.bind(policy.deltas()):
            outputs.append(logits_of(policy.model))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_an_adapted_linear_can_be_built_on_its_own():
    base = nn.Linear(4, 6)
    layer = AdaptedLinear(base, compute_svd(base.weight.data))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), base(x))
