"""Traps that other tools fall into, and pyft must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyft.errors import FrozenError
from pyft.freezing import eval_mode
from pyft.freezing.plan import freeze


class Net(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1), norm(4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def train(model: nn.Module, steps: int = 20, optimizer: torch.optim.Optimizer | None = None) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(wanted, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        x = torch.randn(8, 3, 6, 6, generator=generator) * 3 + 1
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.eval()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "made before freezing"])
def test_frozen_is_bit_identical_after_training(optimizer: str) -> None:
    torch.manual_seed(0)
    model = Net()
    made: torch.optim.Optimizer | None = None
    if optimizer == "made before freezing":
        made = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        train(model, 3, made)  # moments that would go on moving what is frozen now
    plan = freeze(model, "features*")
    if optimizer == "sgd":
        wanted = [p for p in model.parameters() if p.requires_grad]
        made = torch.optim.SGD(wanted, lr=0.1, momentum=0.9, weight_decay=0.1)
    before = state(model)
    train(model, 20, made)
    plan.verify(model)
    for name, tensor in state(model).items():
        assert same_bits(tensor, before[name]) == name.startswith("features"), name


def test_batch_norm_statistics_move_when_nothing_is_frozen() -> None:
    """The check above can fail."""
    model = Net()
    before = state(model)
    train(model, 1)
    assert int(model.features[1].num_batches_tracked) == 1
    assert not same_bits(model.features[1].running_mean, before["features.1.running_mean"])


def test_frozen_norms_stay_in_eval_through_every_call_of_train() -> None:
    model = Net()
    freeze(model, "features*")
    calls = [
        model.train, model.eval, lambda: model.train(True), model.features.train, lambda: model.features[1].train(True),
        lambda: model.apply(lambda module: module.train()), lambda: copy.deepcopy(model).train(),
    ]  # fmt: skip
    for call in calls:
        call()
        assert not any(module.training for module in model.features.modules())
    model.train()
    assert model.training
    assert model.head.training


def test_dropout_inside_what_is_frozen_is_off() -> None:
    model = Net()
    freeze(model, "features*")
    model.train()
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(model.features(x), model.features(x))
    freeze(model, "features.0*")
    model.train()
    assert not torch.equal(model.features(x), model.features(x))


def test_statistics_are_the_running_ones_in_train_and_eval() -> None:
    """Turning off track_running_stats makes train and eval differ; staying in eval does not."""
    model = Net()
    train(model, 5)
    freeze(model, "features*")
    x = torch.randn(4, 3, 6, 6) * 5 + 3
    trained = model.train().features(x)
    assert torch.equal(trained, model.eval().features(x))
    assert model.features[1].track_running_stats


def test_a_frozen_norm_in_a_part_that_trains() -> None:
    model = Net()
    plan = freeze(model, ["*.1", "*.5"])
    assert plan.frozen == ["features.1.weight", "features.1.bias", "features.5.weight", "features.5.bias"]
    before = state(model)
    train(model)
    plan.verify(model)
    for name, tensor in state(model).items():
        assert same_bits(tensor, before[name]) == name.startswith(("features.1.", "features.5.")), name
    model.train()
    assert model.features[3].training


def plain_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=False)


@pytest.mark.parametrize(
    "how",
    [
        {"what": "features*"},
        {"what": "features.*"},
        {"what": "head", "only": True},
        {"what": lambda name, _: name.startswith("features")},
        {"what": ["features.0", "features.1", "features.4", "features.5"]},
    ],
    ids=["glob", "inner glob", "only", "predicate", "names"],
)
def test_norms_without_parameters(how: dict) -> None:
    model = Net(plain_norm)  # type: ignore[arg-type]
    plan = freeze(model, **how)
    before = state(model)
    train(model)
    plan.verify(model)
    assert all(same_bits(tensor, before[name]) for name, tensor in state(model).items() if name.startswith("features"))


def test_norms_without_parameters_beside_the_frozen_part() -> None:
    """A norm at the top of the model: it has no frozen parameter, and must hold still when only the head trains."""

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.first(x)))

    for how in ({"what": "head", "only": True}, {"what": lambda name, _: not name.startswith("head")}):
        model = Top()
        plan = freeze(model, **how)  # type: ignore[arg-type]
        model.train()
        model(torch.randn(8, 4))
        assert int(model.norm.num_batches_tracked) == 0
        plan.verify(model)
    freeze(model, "first")
    model.train()(torch.randn(8, 4))
    assert int(model.norm.num_batches_tracked) == 1
    blocks = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
    freeze(blocks, 1)
    blocks.train()(torch.randn(8, 4))
    assert int(blocks[1].num_batches_tracked) == 0


def test_equal_zero_biases_both_train() -> None:
    """Parameters are known by identity: two equal ones are two."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for layer in (model[0], model[2], model[4]):
        nn.init.zeros_(layer.bias)
    plan = freeze(model, "0")
    assert plan.trainable == ["2.weight", "2.bias", "4.weight", "4.bias"]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(wanted) == 4
    optimizer = torch.optim.AdamW(wanted, lr=0.1)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert not model[0].bias.any()
    assert model[2].bias.all()
    assert model[4].bias.all()
    plan.verify(model)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def test_a_frozen_prefix_keeps_nothing_for_backward() -> None:
    model = Net()
    x = torch.randn(8, 3, 16, 16)
    model.train()
    assert saved_bytes(model.features, x) > 100_000
    freeze(model, "features*")
    model.train()
    assert saved_bytes(model.features, x) == 0
    assert saved_bytes(model, x) == 8 * 4 * 4  # the head's input
    assert not model.features(x).requires_grad


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return self.head(x)


def test_checkpointing_behind_frozen_layers_keeps_the_gradients() -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=False)
    plan = freeze(model, 2)
    x = torch.randn(8, 4)
    plain = copy.deepcopy(model)
    model.train()(x).square().sum().backward()
    plain.eval()(x).square().sum().backward()
    assert plan.without_gradient(model) == []
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (name in plan.frozen)
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_lost_by_reentrant_checkpointing_are_named() -> None:
    model = Checkpointed(reentrant=True)
    plan = freeze(model, 2)
    model.train()(torch.randn(8, 4)).square().sum().backward()
    assert plan.without_gradient(model) == [
        "blocks.2.0.weight",
        "blocks.2.0.bias",
        "blocks.3.0.weight",
        "blocks.3.0.bias",
    ]


def test_checkpointing_of_transformers_behind_frozen_layers() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model._activation_checkpointing_enable()
    plan = freeze(model, 2)
    model.train()
    ids = torch.randint(0, 50, (2, 5))
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().backward()
    assert plan.without_gradient(model) == []
    assert all(name.startswith("encoder.layer.2.") for name in plan.trainable)


def test_unfreezing_in_the_middle_goes_on_with_the_same_moments() -> None:
    """Stages: freeze, train, unfreeze, train on with add_param_group; nothing is silently frozen again."""
    torch.manual_seed(0)
    model = Net()
    plan = freeze(model, "head", only=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, 3, optimizer)
    plan.verify(model)
    moments = optimizer.state[model.head.weight]["exp_avg"]
    less = plan.thaw(model, "features.4*")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    optimizer.add_param_group({"params": [named[n] for n in less.trainable if id(named[n]) not in known], "lr": 1e-3})
    before = state(model)
    train(model, 3, optimizer)
    less.verify(model)
    assert optimizer.state[model.head.weight]["exp_avg"] is moments
    assert int(optimizer.state[model.features[4].weight]["step"]) == 3
    assert not same_bits(model.features[4].weight, before["features.4.weight"])
    with pytest.raises(FrozenError, match=r"'features\.4\.weight'"):
        plan.verify(model)


def test_spectral_norm_of_a_frozen_layer_holds_still() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    for what in ("0", "0.weight"):
        plan = freeze(model, what)
        model.train()
        before = state(model)
        for _ in range(3):
            model(torch.randn(8, 4)).sum().backward()
        plan.verify(model)
        assert all(same_bits(tensor, before[name]) for name, tensor in state(model).items())
    freeze(model, None)
    model.train()(torch.randn(8, 4))
    assert not same_bits(state(model)["0.parametrizations.weight.0._u"], before["0.parametrizations.weight.0._u"])


def test_a_dropout_that_two_parts_share_is_said() -> None:
    drop = nn.Dropout(0.5)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), drop), "b": nn.Sequential(nn.Linear(2, 2), drop)})
    plan = freeze(model, "a*")
    assert plan.notes == ["'a.1' and 'b.1' are one module: it stays in eval mode for both"]
    assert plan.notes[0] in str(plan)
    assert not model.train()["b"][1].training


def test_a_frozen_rnn_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN refuses backward through an RNN in eval mode: there, and without dropout, it may be in train mode."""
    model = nn.ModuleList([nn.Embedding(5, 4), nn.LSTM(4, 4), nn.GRU(4, 4, 2, dropout=0.5)])
    freeze(model, ["1", "2"])
    assert [module.training for module in model.train()] == [True, False, False]
    real = torch.nn.Parameter.is_cuda
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    assert [module.training for module in model.train()] == [True, True, False]
    assert [module.training for module in model.eval()] == [False, False, False]
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", real, raising=False)
    assert eval_mode.kept(model[1]) is not None


@pytest.mark.cuda
def test_cuda_parameters_and_backward_through_a_frozen_rnn() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    model = nn.ModuleDict({"e": nn.Linear(3, 4), "rnn": nn.LSTM(4, 4), "head": nn.Linear(4, 2)}).cuda()
    plan = freeze(model, "rnn")
    model.train()
    model["head"](model["rnn"](model["e"](torch.randn(5, 2, 3, device="cuda")))[0]).sum().backward()
    assert plan.without_gradient(model) == []
    plan.verify(model)
    with torch.no_grad():
        model["rnn"].bias_hh_l0[0] += 1
    with pytest.raises(FrozenError, match=r"rnn\.bias_hh_l0"):
        plan.verify(model)


def test_frozen_embeddings_with_weight_decay_hold_still() -> None:
    """Zeroed gradients are not enough: decay moves a row whose gradient is zero."""
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    plan = freeze(model, "0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)  # knows the frozen one too
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, 10, (4, 3))).sum().backward()
        optimizer.step()
    plan.verify(model)
