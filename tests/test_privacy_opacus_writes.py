"""What Opacus' users write to its objects: each attribute is followed, or refused by name."""

import math
import warnings

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus import schedulers
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privacy import (
    BudgetExceeded,
    GaussianSteps,
    PlanError,
    PrivacyError,
    StepError,
    accounting,
    epsilon_of,
)
from privacy.opacus import PrivacyEngine

SAMPLES, BATCH = 64, 16
DELTA = 1e-3


@pytest.fixture(autouse=True)
def by_rdp_alone(monkeypatch):
    """These tests ask what is charged, not how tightly: the slower accountant stays out."""
    accounting._tightest.cache_clear()
    monkeypatch.setattr(accounting, "_LARGEST_PRV_EPSILON", -1.0)
    yield
    accounting._tightest.cache_clear()


def data_of(count: int = SAMPLES) -> TensorDataset:
    """Four features, two classes."""
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 4, generator=random), torch.arange(count) % 2)


class Training:
    """An engine and its private three: a class because every test reads several of them."""

    def __init__(self, *, batch=BATCH, lr=0.1, noise=1.0, optimizer=torch.optim.SGD, account=None):
        self.engine = PrivacyEngine()
        if account is not None:
            self.engine.accountant.load_state_dict(account)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=optimizer(self.net.parameters(), lr=lr),
            data_loader=DataLoader(data_of(), batch_size=batch),
            noise_multiplier=noise,
            max_grad_norm=1.0,
        )

    def step(self, steps: int = 1) -> None:
        """So many steps."""
        for _ in range(steps):
            images, labels = next(iter(self.loader))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()

    def moved(self) -> torch.Tensor:
        """How far one step moves the parameters, in one row."""
        before = self.parameters()
        self.step()
        return self.parameters() - before

    def parameters(self) -> torch.Tensor:
        """All of them in one row."""
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    def epsilon(self) -> float:
        """What the engine says."""
        return self.engine.get_epsilon(DELTA)


def cost(*steps: tuple[float, int]) -> float:
    """Epsilon of (noise, steps) at the rate of the tests, by the package's accounting."""
    events = [
        GaussianSteps(noise_multiplier=noise, sampling_rate=BATCH / SAMPLES, steps=number)
        for noise, number in steps
    ]
    return epsilon_of(events, DELTA)


# --- the optimizer -------------------------------------------------------------------------------


def _noise_multiplier(t):
    t.step()
    t.optimizer.noise_multiplier = 1e-9
    assert t.optimizer.noise_multiplier == 1e-9
    assert t.moved().norm() <= 0.1 * 1.5  # noise 1e-9: what moves is the clipped mean
    assert t.engine.accountant.history == [(1.0, 0.25, 1), (1e-9, 0.25, 1)]


def _max_grad_norm(t):
    t.optimizer.noise_multiplier = 1e-9
    t.optimizer.max_grad_norm = 1e-6
    assert t.optimizer.max_grad_norm == 1e-6
    # At most 64 examples of norm C, over 16, by the rate 0.1.
    assert 0 < t.moved().norm() <= 0.1 * 1e-6 * SAMPLES / BATCH


def _expected_batch_size(t):
    t.optimizer.noise_multiplier, t.optimizer.max_grad_norm = 1e-9, 1e-3
    t.optimizer.expected_batch_size = 1000
    assert 0 < t.moved().norm() <= 0.1 * 1e-3 * SAMPLES / 1000 * 1.1


def _loss_reduction(t):
    t.optimizer.noise_multiplier = 1e-9
    t.optimizer.loss_reduction = "sum"
    before = t.parameters()
    images, labels = next(iter(t.loader))
    F.cross_entropy(t.model(images), labels, reduction="sum").backward()
    t.optimizer.step()
    # Not divided: far more than a mean of clipped gradients can move.
    assert (t.parameters() - before).norm() > 0.1


def _param_groups(t):
    t.optimizer.param_groups = [{**group, "lr": 0.0} for group in t.optimizer.param_groups]
    assert t.optimizer.original_optimizer.param_groups[0]["lr"] == 0.0
    assert t.moved().norm() == 0
    t.optimizer.param_groups[0]["lr"] = 1.0
    assert t.moved().norm() > 0
    with pytest.raises(StepError, match="param_groups"):
        t.optimizer.param_groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]


def _state(t):
    t.optimizer.param_groups[0]["momentum"] = 0.9
    t.step()
    momentum = {p: dict(state) for p, state in t.optimizer.state.items()}
    assert momentum
    for state in t.optimizer.state.values():
        state.clear()
    t.optimizer.state = type(t.optimizer.state)(dict, momentum)
    assert t.optimizer.original_optimizer.state == momentum


def _defaults(t):
    t.optimizer.defaults = {**t.optimizer.defaults, "lr": 7.0}
    assert t.optimizer.original_optimizer.defaults["lr"] == 7.0


def _step_hook(t):
    seen = []
    t.optimizer.step_hook = lambda optimizer: seen.append(
        (optimizer, t.net[0].weight.grad.clone(), t.net[0].weight.detach().clone())
    )
    before = t.net[0].weight.detach().clone()
    t.step()
    ((optimizer, gradient, weight),) = seen
    assert optimizer is t.optimizer
    assert torch.equal(weight, before)
    assert torch.equal(gradient, t.net[0].weight.grad)
    assert t.engine.accountant.history == [(1.0, 0.25, 1)]


def _attach_step_hook(t):
    calls = []
    t.optimizer.attach_step_hook(calls.append)
    t.step(2)
    assert len(calls) == 2
    assert t.epsilon() == cost((1.0, 2)) > 0


def _generator(t):
    t.optimizer.generator = None
    with pytest.raises(StepError, match=r"generator.*cryptographic"):
        t.optimizer.generator = torch.Generator()


def _secure_mode(t):
    t.optimizer.secure_mode = True
    with pytest.raises(StepError, match=r"secure_mode.*cryptographic"):
        t.optimizer.secure_mode = False


def _signal_skip_step(t):
    t.optimizer.signal_skip_step(True)
    images, labels = next(iter(t.loader))
    t.optimizer.signal_skip_step(do_skip=True)
    F.cross_entropy(t.model(images[:1]), labels[:1]).backward()
    t.optimizer.step()
    assert t.optimizer.ledger.steps == 0


def _accumulated_iterations(t):
    seen = []
    t.optimizer.step_hook = lambda optimizer: seen.append(optimizer.accumulated_iterations)
    t.step(2)
    assert seen == [1, 1]
    with pytest.raises(StepError, match="accumulated_iterations"):
        t.optimizer.accumulated_iterations = 2


def _hooks(t):
    order = []
    t.optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    handle = t.optimizer.register_step_post_hook(lambda *_: order.append("after"))
    t.step()
    handle.remove()
    t.step()
    assert order == ["before", "after", "before"]


def _state_dict_hooks(t):
    calls = []
    t.optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    t.optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    t.optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    t.optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    t.optimizer.load_state_dict(t.optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


def _load_state_dict(t):
    t.step(3)
    other = Training()
    other.optimizer.load_state_dict(t.optimizer.state_dict())
    assert other.epsilon() == t.epsilon() == cost((1.0, 3))
    other.step()
    assert other.epsilon() == cost((1.0, 4))


def _params(t):
    assert [id(p) for p in t.optimizer.params] == [id(p) for p in t.net.parameters()]


def _zero_grad(t):
    t.step()
    t.optimizer.zero_grad()
    assert all(p.grad is None for p in t.net.parameters())


def _step(t):
    calls, own = [], t.optimizer.step
    t.optimizer.step = lambda *a: (calls.append(1), own(*a))
    t.step()
    assert calls == [1]
    assert t.optimizer.ledger.steps == 1


def _original_optimizer(t):
    assert isinstance(t.optimizer.original_optimizer, torch.optim.SGD)
    with pytest.raises(StepError, match="original_optimizer"):
        t.optimizer.original_optimizer = torch.optim.SGD(t.net.parameters(), lr=0.1)


def _add_param_group(t):
    with pytest.raises(StepError, match="add_param_group"):
        t.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


OPTIMIZER = {
    "noise_multiplier": _noise_multiplier,
    "max_grad_norm": _max_grad_norm,
    "expected_batch_size": _expected_batch_size,
    "loss_reduction": _loss_reduction,
    "param_groups": _param_groups,
    "state": _state,
    "defaults": _defaults,
    "step_hook": _step_hook,
    "attach_step_hook": _attach_step_hook,
    "generator": _generator,
    "secure_mode": _secure_mode,
    "signal_skip_step": _signal_skip_step,
    "accumulated_iterations": _accumulated_iterations,
    "register_step_pre_hook": _hooks,
    "register_step_post_hook": _hooks,
    "register_state_dict_pre_hook": _state_dict_hooks,
    "register_state_dict_post_hook": _state_dict_hooks,
    "register_load_state_dict_pre_hook": _state_dict_hooks,
    "register_load_state_dict_post_hook": _state_dict_hooks,
    "load_state_dict": _load_state_dict,
    "state_dict": _load_state_dict,
    "params": _params,
    "zero_grad": _zero_grad,
    "step": _step,
    "original_optimizer": _original_optimizer,
    "add_param_group": _add_param_group,
    # Refused by name, read or written.
    "grad_samples": None,
    "clip_and_accumulate": None,
    "add_noise": None,
    "scale_grad": None,
    "pre_step": None,
    "accumulate": None,
    "reduce_gradients": None,
    "max_grad_norms": None,
    "target_unclipped_quantile": None,
    "clipbound_learning_rate": None,
    "max_clipbound": None,
    "min_clipbound": None,
    "unclipped_num_std": None,
    "sample_size": None,
    "unclipped_num": None,
    "update_max_grad_norm": None,
    "anything_else": None,
}
# Of torch's own optimizers, and neither written nor called by a user.
_OF_TORCH = {"profile_hook_step", "OptimizerPreHook", "OptimizerPostHook"}


# --- the module ----------------------------------------------------------------------------------


def _to_standard_module(t):
    assert t.model.to_standard_module() is t.net
    assert not any("forward" in vars(layer) for layer in t.net.modules())


def _cleanup(t):
    t.model.cleanup()
    assert not any("forward" in vars(layer) for layer in t.net.modules())


def _forbid(t):
    t.model.forbid_grad_accumulation()
    images, labels = next(iter(t.loader))
    for _ in range(2):
        F.cross_entropy(t.model(images), labels).backward()
    with pytest.raises(StepError, match="more than one backward pass"):
        t.optimizer.step()


def _forget(name):
    def check(t):
        images, labels = next(iter(t.loader))
        F.cross_entropy(t.model(images), labels).backward()
        getattr(t.model, name)()
        with pytest.raises(StepError, match="no backward pass"):
            t.optimizer.step()

    return check


def _forward(t):
    images = torch.rand(3, 4)
    assert torch.equal(t.model(images), t.net(images))
    with pytest.raises(StepError, match="forward"):
        t.model.forward = lambda images: images


MODULE = {
    "forward": _forward,
    "to_standard_module": _to_standard_module,
    "cleanup": _cleanup,
    "forbid_grad_accumulation": _forbid,
    "set_grad_sample_to_none": _forget("set_grad_sample_to_none"),
    "del_grad_sample": _forget("del_grad_sample"),
    "zero_grad": _forget("zero_grad"),
    **dict.fromkeys(
        (
            *("add_hooks", "remove_hooks", "disable_hooks", "enable_hooks", "hooks_enabled"),
            *("autograd_grad_sample_hooks", "capture_activations_hook", "iterate_submodules"),
            *("capture_backprops_hook", "rearrange_grad_samples", "grad_accumulation_hook"),
            *("grad_accumulation_allowed", "allow_grad_accumulation", "batch_first"),
            *("loss_reduction", "force_functorch", "GRAD_SAMPLERS", "is_supported"),
            *("validate", "anything_else"),
        )
    ),
}


# --- the loader and the engine -------------------------------------------------------------------


def _collate_fn(t):
    t.loader.collate_fn = lambda rows: [torch.stack([r[0] * 0 for r in rows])]
    assert not next(iter(t.loader))[0].any()
    t.loader.batch_sampler._generator.bernoulli = lambda n, p: torch.zeros(n, dtype=torch.bool)
    assert next(iter(t.loader))[0].shape == (1, 4)


def _sample_rate(t):
    assert t.loader.sample_rate == 0.25
    with pytest.raises(StepError, match="sample_rate"):
        t.loader.sample_rate = 0.5


def _native(name, value):
    def check(t):
        setattr(t.loader, name, value)
        assert getattr(t.loader, name) == value
        t.step()

    return check


LOADER = {
    "collate_fn": _collate_fn,
    "sample_rate": _sample_rate,
    "pin_memory": _native("pin_memory", False),
    "pin_memory_device": _native("pin_memory_device", ""),
    "timeout": _native("timeout", 0),
    "worker_init_fn": _native("worker_init_fn", print),
    "multiprocessing_context": _native("multiprocessing_context", None),
    **dict.fromkeys(
        (
            *("generator", "distributed", "dataset", "batch_size", "batch_sampler", "sampler"),
            *("drop_last", "num_workers", "persistent_workers", "prefetch_factor", "in_order"),
            "anything_else",
        )
    ),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", value) for value in (print, "soon", -1, float("nan"), 3.0, None)),
        *(("collate_fn", value) for value in (None, 3)),
        ("worker_init_fn", 3),
        *((name, print) for name in ("_samples", "_anything")),
    ],
)
def test_a_loader_refuses_what_its_next_pass_would_end_in(name, value):
    """By name when it is written, not in torch's words when it is read."""
    t = Training()
    with pytest.raises((PlanError, StepError), match=name):
        setattr(t.loader, name, value)
    t.step()


def test_a_loader_whose_workers_have_started_refuses_what_they_would_not_hear():
    """Persistent workers keep what they were started with."""
    t = Training()
    vars(t.loader).update(persistent_workers=True, _iterator=object())
    with pytest.raises(StepError, match=r"collate_fn: its persistent workers were started"):
        t.loader.collate_fn = print


def _accountant(t):
    t.step(2)
    assert t.engine.accountant is t.engine.accountant
    with pytest.raises(StepError, match=r"accountant.*load_state_dict"):
        t.engine.accountant = RDPAccountant()
    assert t.epsilon() == cost((1.0, 2))


ENGINE = {
    "accountant": _accountant,
    "secure_mode": None,
    "secure_rng": None,
    "dataset": None,
    "anything_else": None,
}

TABLE = [
    (owner, name, check)
    for owner, table in {
        "optimizer": OPTIMIZER,
        "model": MODULE,
        "loader": LOADER,
        "engine": ENGINE,
    }.items()
    for name, check in table.items()
]


@pytest.mark.parametrize(("owner", "name", "check"), TABLE, ids=[f"{o}.{n}" for o, n, _ in TABLE])
def test_every_attribute_is_followed_or_refused_by_name(owner, name, check):
    """A followed one has its effect; a refused one raises ours, with its name, and stays away."""
    training = Training()
    if check is not None:
        check(training)
        return
    target = getattr(training, owner)
    before = vars(target).get(name)
    with pytest.raises(PrivacyError, match=name) as refused:
        setattr(target, name, 1)
    assert isinstance(refused.value, AttributeError)
    assert len(str(refused.value).split(": ")[-1]) > 20
    assert vars(target).get(name) is before
    training.step()


def _public(value) -> set[str]:
    return {name for name in dir(value) if not name.startswith("_")}


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_all_of_opacus():
    """Read off Opacus' own objects, so that its next version cannot add an attribute unseen."""
    net = nn.Sequential(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = opacus.PrivacyEngine()
    settings = {"data_loader": DataLoader(data_of(), 16), "max_grad_norm": 1.0}
    model, private, loader = engine.make_private(
        module=net, optimizer=optimizer, noise_multiplier=1.0, **settings
    )
    of_optimizers = _public(private) | _public(DPPerLayerOptimizer) | _public(AdaClipDPOptimizer)
    assert isinstance(private, DPOptimizer)
    assert of_optimizers - _OF_TORCH <= set(OPTIMIZER)
    assert _public(model) - _public(nn.Sequential(nn.Linear(1, 1))) <= set(MODULE)
    assert isinstance(loader, DPDataLoader)
    assert _public(loader) - {"from_data_loader", "check_worker_number_rationality"} - {
        "get_attribute_name",
    } <= set(LOADER) | {"dataset_kind"}
    own = {name for name in vars(engine) if not name.startswith("_")}
    assert own <= set(ENGINE)
    assert _public(opacus.PrivacyEngine) <= _public(PrivacyEngine)


def test_every_method_of_the_account_is_there():
    """The engine's account is one of Opacus' accountants, by class and by interface."""
    for mechanism, kind in {"prv": PRVAccountant, "rdp": RDPAccountant}.items():
        account = PrivacyEngine(accountant=mechanism).accountant
        assert isinstance(account, kind)
        assert _public(kind()) <= _public(account)
        assert account.mechanism() == mechanism
        with pytest.raises(PlanError, match="anything_else"):
            account.anything_else = 1


@pytest.mark.parametrize("name", ["sample_rate", "num_samples", "generator", "steps"])
def test_the_samples_cannot_be_written_to(name):
    """Neither by Opacus' names on the sampler."""
    with pytest.raises(StepError, match=name):
        setattr(Training().loader.batch_sampler, name, 1)


@pytest.mark.parametrize("kept", ["grad_sample", "summed_grad"])
def test_a_gradient_written_for_opacus_is_refused(kept):
    """Opacus would step by it; here nobody reads it."""
    training = Training()
    images, labels = next(iter(training.loader))
    F.cross_entropy(training.model(images), labels).backward()
    setattr(training.net[0].weight, kept, torch.zeros(16, 3, 4))
    with pytest.raises(StepError, match=rf"0\.weight\.{kept}"):
        training.optimizer.step()


def test_a_write_to_the_wrapper_reaches_the_module():
    """An attribute that the user's module has is the module's; others do not stick."""
    training = Training()
    training.net.temperature = 1.0
    training.model.temperature = 2.0
    assert training.net.temperature == 2.0
    for name in ("add_module", "register_module", "register_buffer", "register_parameter"):
        with pytest.raises(StepError, match=name):
            getattr(training.model, name)("more", None)
    with pytest.raises(StepError, match="compile"):
        training.model.compile()
    with pytest.raises(StepError, match="state_dict"):
        training.optimizer.__getstate__()
    images, labels = next(iter(training.loader))
    F.cross_entropy(training.model(images), labels).backward()
    training.model.requires_grad_(False)
    with pytest.raises(StepError, match=r"0\.bias"):
        training.optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("noise_multiplier", value) for value in (0.0, -1.0, math.nan, math.inf, "1", None)),
        *(("max_grad_norm", value) for value in (0.0, math.nan, [1.0, 1.0])),
        *(("expected_batch_size", value) for value in (0, 1.5, True)),
        ("loss_reduction", "none"),
    ],
)
def test_a_value_out_of_range_is_refused_and_changes_nothing(name, value):
    """One error of ours."""
    training = Training()
    before = getattr(training.optimizer, name)
    with pytest.raises(PlanError, match=name):
        setattr(training.optimizer, name, value)
    assert getattr(training.optimizer, name) == before


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "noises"),
    [
        (lambda o: schedulers.ExponentialNoise(o, gamma=0.5), [1.0, 0.5, 0.25]),
        (lambda o: schedulers.LambdaNoise(o, noise_lambda=lambda e: 1 + e), [1.0, 2.0, 3.0]),
        (lambda o: schedulers.StepNoise(o, step_size=2, gamma=0.5), [1.0, 1.0, 0.5]),
    ],
    ids=["exponential", "lambda", "step"],
)
def test_a_schedule_of_the_noise_is_accounted_step_by_step(make, noises):
    """Opacus' own schedulers: each step costs what its own noise costs."""
    training = Training()
    schedule = make(training.optimizer)
    for _ in noises:
        training.step()
        schedule.step()
    assert training.epsilon() == pytest.approx(cost(*((n, 1) for n in noises)))
    assert [noise for noise, _, _ in training.engine.accountant.history] == list(
        dict.fromkeys(noises)
    )


def test_a_schedule_of_the_noise_moves_the_noise():
    """Zero gradients: what is left of a step is its noise, here a millionth of the first's."""
    training = Training()
    schedule = schedulers.ExponentialNoise(training.optimizer, gamma=1e-6)
    moved = []
    for _ in range(2):
        before = training.parameters()
        training.optimizer.zero_grad()
        (0 * training.model(next(iter(training.loader))[0])).mean().backward()
        training.optimizer.step()
        moved.append((training.parameters() - before).norm().item())
        schedule.step()
    # Two norms of 23 normal numbers: a ratio a thousand times off is as good as impossible, for
    # P(chi2_23 < 23e-6 or > 23e6) is below 1e-60.
    assert 1e-9 < moved[1] / moved[0] < 1e-3


@pytest.mark.parametrize(
    ("make", "norms"),
    [
        (lambda o: schedulers.ExponentialGradClip(o, gamma=0.5), [1.0, 0.5, 0.25]),
        (lambda o: schedulers.LambdaGradClip(o, scheduler_function=lambda e: 2.0**e), [1, 2, 4]),
        (lambda o: schedulers.StepGradClip(o, step_size=2, gamma=0.1), [1.0, 1.0, 0.1]),
    ],
    ids=["exponential", "lambda", "step"],
)
def test_a_schedule_of_the_clipping_norm_is_followed(make, norms):
    """Next to no noise: no step moves further than its own C allows."""
    training = Training(noise=1e-9, lr=1.0)
    schedule = make(training.optimizer)
    for norm in norms:
        assert training.optimizer.max_grad_norm == pytest.approx(norm)
        assert training.moved().norm() <= norm * SAMPLES / BATCH
        schedule.step()


def test_schedules_of_the_learning_rate_are_followed():
    """A warm-up and a cosine, by torch: the original's rate moves, and the steps with it."""
    training = Training(lr=1.0)
    torch.optim.lr_scheduler.LinearLR(training.optimizer, start_factor=1e-9, total_iters=5)
    assert training.moved().norm() < 1e-6
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, T_max=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.step()
        schedule.step()


def test_the_norm_of_a_sample_under_way_stays():
    """Clipping and noise of one sample use the same C."""
    training = Training(batch=SAMPLES)
    images, labels = next(iter(training.loader))
    training.optimizer.signal_skip_step(True)
    F.cross_entropy(training.model(images[:5]), labels[:5]).backward()
    training.optimizer.step()
    for name, value in (("max_grad_norm", 1e-9), ("loss_reduction", "sum")):
        with pytest.raises(StepError, match=name):
            setattr(training.optimizer, name, value)


# --- the account ---------------------------------------------------------------------------------


def test_what_is_written_to_the_account_is_spent():
    """step, load_state_dict, assignment, and a change of the list in place."""
    training = Training()
    account = training.engine.accountant
    account.step(noise_multiplier=1.0, sample_rate=0.25)
    assert training.epsilon() == cost((1.0, 1))
    account.load_state_dict({"history": [(1.0, 0.25, 5)], "mechanism": "prv"})
    assert training.epsilon() == cost((1.0, 5))
    account.history = [(1.0, 0.25, 5), (0.7, 0.25, 1)]
    assert training.epsilon() == cost((1.0, 5), (0.7, 1))
    account.history.append((0.6, 0.25, 2))
    assert training.epsilon() == account.get_epsilon(DELTA) == cost((1.0, 5), (0.7, 1), (0.6, 2))
    training.step()
    assert training.epsilon() == pytest.approx(cost((1.0, 6), (0.7, 1), (0.6, 2)))
    second = Training()
    second.engine.accountant.load_state_dict(account.state_dict())
    assert second.epsilon() == training.epsilon()


@pytest.mark.parametrize(
    "less",
    [
        lambda account: account.load_state_dict({"history": [(1.0, 0.25, 1)], "mechanism": "prv"}),
        lambda account: setattr(account, "history", []),
        lambda account: account.history.clear(),
        lambda account: account.history.__setitem__(0, (1.0, 0.25, 0)),
        lambda account: setattr(account, "history", [(1e6, 1e-9, 100)]),
    ],
    ids=["loaded", "assigned", "cleared", "overwritten", "cheaper"],
)
def test_what_was_spent_never_falls(less):
    """A write that says less leaves the larger: 4 steps stay 4."""
    training = Training()
    training.step(4)
    less(training.engine.accountant)
    assert training.epsilon() >= cost((1.0, 4))
    assert training.engine.accountant.get_epsilon(DELTA) >= cost((1.0, 4))
    training.step()
    assert training.epsilon() >= cost((1.0, 5))


@pytest.mark.parametrize(
    "history",
    [
        [(1e6, 1e-9, 72)],
        [(1.0, 1e-9, 72)],
        [(1e6, 0.25, 72)],
        [(1.0, 0.25, -3)],
        [(1.0, 0.25, 2.5)],
        [(math.nan, 0.25, 1)],
        [(1.0, 1.5, 1)],
        [("1.0", 0.25, 1)],
        [(1.0, 0.25)],
        "history",
        None,
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["made", "not yet made"])
def test_a_forged_account_is_refused(history, before):
    """Cheap steps, steps that are no number, and what is no history: nothing of it is taken."""
    state = {"history": history, "mechanism": "prv"}
    if before:
        with pytest.raises(PlanError, match="accountant"):
            Training(account=state)
        return
    training = Training()
    training.step()
    with pytest.raises(PlanError, match="accountant"):
        training.engine.accountant.load_state_dict(state)
    assert training.epsilon() == cost((1.0, 1))


@pytest.mark.parametrize("state", [None, {}, {"history": []}, {"mechanism": "prv"}])
def test_a_state_that_is_none_is_refused(state):
    """With ours, which is a ValueError as Opacus' own."""
    with pytest.raises(ValueError, match="accountant state"):
        PrivacyEngine().accountant.load_state_dict(state)


def test_an_account_of_another_mechanism_is_refused():
    """As in Opacus, with the cure."""
    saved = PrivacyEngine(accountant="rdp").accountant.state_dict()
    with pytest.raises(PlanError, match="accountant='rdp'"):
        PrivacyEngine().accountant.load_state_dict(saved)


def test_a_garbled_list_stops_the_next_step():
    """Nothing is released on an account that cannot be read; it can be mended."""
    training = Training()
    training.engine.accountant.history.append("no entry")
    before = training.parameters()
    with pytest.raises(PlanError, match="history"):
        training.step()
    assert torch.equal(training.parameters(), before)
    training.engine.accountant.history = []
    training.step()
    assert training.epsilon() == pytest.approx(cost((1.0, 1)))


def test_a_target_holds_whatever_is_written():
    """More noise is followed; what the account is told comes off the budget."""
    net, engine = nn.Linear(4, 2), PrivacyEngine()
    _, optimizer, _ = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data_of(), batch_size=BATCH),
        target_epsilon=3.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
    )
    noise = optimizer.noise_multiplier
    optimizer.noise_multiplier = 2 * noise
    engine.accountant.history.append((noise, 0.25, 8))
    with pytest.raises(BudgetExceeded, match="target_epsilon=3"):
        optimizer.step()


def test_a_forged_ledger_of_the_optimizer_is_refused():
    """More noise, another rate, and fewer steps than Adam has counted."""
    training = Training(optimizer=torch.optim.Adam)
    training.step(3)
    honest = training.optimizer.state_dict()
    for forged in (
        [{"noise_multiplier": 1e6, "sampling_rate": 0.25, "steps": 3}],
        [{"noise_multiplier": 1.0, "sampling_rate": 1e-9, "steps": 3}],
        [{"noise_multiplier": 1.0, "sampling_rate": 0.25, "steps": 1}],
        [],
    ):
        other = Training(optimizer=torch.optim.Adam)
        state = {**honest, "privacy": {**honest["privacy"], "ledger": forged}}
        with pytest.raises(PlanError, match="ledger"):
            other.optimizer.load_state_dict(state)
        assert not other.optimizer.state
    other.optimizer.load_state_dict(honest)
    assert other.epsilon() == training.epsilon()


def made_private(ledger=None, **settings):
    """An engine, and the model, optimizer and loader that it made."""
    torch.manual_seed(0)
    net, engine = nn.Linear(4, 2), PrivacyEngine(ledger=ledger)
    three = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data_of(), batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **settings,
    )
    return engine, *three


def pass_over(model, optimizer, loader):
    """Trains once over the loader."""
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_rolled_back_checkpoint_of_opacus_modes_is_charged_for_the_larger(tmp_path):
    """In the engine that trained on, and in a fresh one."""
    engine, *three = made_private(grad_sample_mode="hooks")
    pass_over(*three)
    engine.save_checkpoint(path=tmp_path / "early.pt", module=three[0], optimizer=three[1])
    pass_over(*three)
    engine.save_checkpoint(path=tmp_path / "late.pt", module=three[0], optimizer=three[1])
    spent = engine.get_epsilon(DELTA)
    assert spent == cost((1.0, 8))
    engine.load_checkpoint(path=tmp_path / "early.pt", module=three[0], optimizer=three[1])
    assert engine.get_epsilon(DELTA) == spent
    fresh, *others = made_private(grad_sample_mode="hooks")
    fresh.load_checkpoint(path=tmp_path / "late.pt", module=others[0], optimizer=others[1])
    assert fresh.get_epsilon(DELTA) == spent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("history", [[(1e6, 1e-9, 8)], [(1.0, 0.25, -8)], "no history", None])
def test_a_forged_checkpoint_of_opacus_modes_is_refused(tmp_path, history):
    """With another account, or with none; module and epsilon stay as they were."""
    engine, *three = made_private(grad_sample_mode="hooks")
    engine.save_checkpoint(path=tmp_path / "made.pt", module=three[0], optimizer=three[1])
    forged = torch.load(tmp_path / "made.pt", weights_only=False)
    account = {"history": history, "mechanism": "prv"}
    del forged["privacy_accountant_state_dict"]
    torch.save(
        forged | ({} if history is None else {"privacy_accountant_state_dict": account}),
        tmp_path / "forged.pt",
    )
    fresh, model, optimizer, _ = made_private(grad_sample_mode="hooks")
    with torch.no_grad():
        model._module.weight.zero_()
    with pytest.raises(PlanError):
        fresh.load_checkpoint(path=tmp_path / "forged.pt", module=model, optimizer=optimizer)
    assert not model._module.weight.any()
    assert fresh.get_epsilon(DELTA) == 0


def test_a_rolled_back_state_is_charged_for_the_larger_of_file_and_state(tmp_path):
    """Steps in the file are spent though the state, or a new process, knows fewer."""
    path = tmp_path / "spent.jsonl"
    _, model, optimizer, loader = made_private(path)
    early = optimizer.state_dict()
    pass_over(model, optimizer, loader)
    middle = optimizer.state_dict()
    pass_over(model, optimizer, loader)
    with pytest.raises(PlanError, match="ledger's file is bound"):
        optimizer.noise_multiplier = 0.5
    optimizer.ledger.close()
    for state in (None, early, middle):
        engine, model, optimizer, loader = made_private(path)
        if state is not None:
            optimizer.load_state_dict(state)
        assert engine.get_epsilon(DELTA) == cost((1.0, 8))
        optimizer.ledger.close()
    with pytest.raises(PlanError, match="ledger"):
        PrivacyEngine(ledger=path).make_private(
            module=nn.Linear(4, 2), optimizer=None, data_loader=loader, noise_multiplier=1.0,
            max_grad_norm=1.0, grad_sample_mode="hooks",
        )  # fmt: skip
