"""Every public name of Opacus' objects, walked: the drop-in has it, or refuses it by name."""

import inspect
import re
from pathlib import Path

import opacus
import pytest
import torch
from opacus import accountants, grad_sample, optimizers, schedulers
from opacus.accountants.registry import _ACCOUNTANTS
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privacy import PlanError
from privacy.opacus import PrivacyEngine, refusals

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "opacus.md"
OWNERS = ("engine", "module", "optimizer", "loader", "sampler", "account", "cut loader")
REFUSED = {
    "engine": refusals.ENGINE,
    "module": refusals.MODULE,
    "optimizer": refusals.OPTIMIZER,
    "loader": refusals.LOADER,
}


def made(engine_class) -> dict[str, object]:
    """What an engine gives, and what hangs on it."""
    net, engine = nn.Sequential(nn.Linear(4, 2)), engine_class()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.rand(64, 4), torch.arange(64) % 2), batch_size=16
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer)
    with manager as cut:
        parts = (engine, model, optimizer, loader, loader.batch_sampler, engine.accountant, cut)
    return dict(zip(OWNERS, parts, strict=True))


def public(value: object) -> set[str]:
    """Names without an underscore before them."""
    return {name for name in dir(value) if not name.startswith("_")}


def of_opacus() -> dict[str, set[str]]:
    """Public names by owner: of what Opacus makes, and of all its kinds of optimizer and module."""
    names = {owner: public(value) for owner, value in made(opacus.PrivacyEngine).items()}
    for room, owner, base in (
        (optimizers, "optimizer", DPOptimizer),
        (grad_sample, "module", grad_sample.AbstractGradSampleModule),
    ):
        kinds = [kind for kind in vars(room).values() if inspect.isclass(kind)]
        for kind in kinds:
            if issubclass(kind, base):
                names[owner] |= public(kind)
    return names


@pytest.mark.filterwarnings("ignore")
def test_every_public_name_is_there_or_refused_by_name():
    """Read off Opacus' objects, so that its next version cannot add one unseen."""
    ours, asked = made(PrivacyEngine), 0
    for owner, names in of_opacus().items():
        for name in sorted(names - set(_there(ours[owner], names))):
            assert name in REFUSED[owner], f"{owner}.{name}: neither there nor refused"
            with pytest.raises(refusals.RefusedAttribute) as refused:
                getattr(ours[owner], name)
            assert f".{name}: not followed in the fused mode: {REFUSED[owner][name]}" in str(
                refused.value
            )
            asked += 1
    assert asked > 20


def _there(value: object, names: set[str]) -> list[str]:
    return [name for name in names if hasattr(value, name)]


@pytest.mark.filterwarnings("ignore")
def test_every_method_takes_the_arguments_that_opacus_takes():
    """By name and in order; what it does with each is for other tests."""
    theirs, ours = made(opacus.PrivacyEngine), made(PrivacyEngine)
    compared = 0
    for owner in OWNERS:
        for name in sorted(public(theirs[owner])):
            method = getattr(type(theirs[owner]), name, None)
            if not inspect.isfunction(method) or not method.__module__.startswith("opacus."):
                continue
            if name in REFUSED.get(owner, ()):
                continue
            wanted = [
                each.name
                for each in inspect.signature(getattr(theirs[owner], name)).parameters.values()
                if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            ]
            taken = inspect.signature(getattr(ours[owner], name)).parameters
            if not any(each.kind == each.VAR_KEYWORD for each in taken.values()):
                missing = [argument for argument in wanted if argument not in taken]
                assert not missing, f"{owner}.{name}: {missing}"
            compared += 1
    assert compared > 15


def in_the_code_of(*rooms: object) -> set[str]:
    """Every name that the methods of the classes in these modules read, write or take."""
    kinds = [kind for room in rooms for kind in vars(room).values() if inspect.isclass(kind)]
    methods = [
        method
        for kind in kinds
        for each in kind.__mro__
        for method in vars(each).values()
        if inspect.isfunction(method) and each.__module__.startswith("opacus.")
    ]
    return {name for method in methods for name in (*method.__code__.co_names, *_arguments(method))}


def _arguments(method) -> tuple[str, ...]:
    return method.__code__.co_varnames[
        : method.__code__.co_argcount + method.__code__.co_kwonlyargcount
    ]


@pytest.mark.filterwarnings("ignore")
def test_no_name_is_refused_that_opacus_does_not_have():
    """The list is no longer than it must be; what is ours is refused to be written alone."""
    rooms = {
        "engine": (opacus.privacy_engine,),
        "module": (grad_sample,),
        "optimizer": (optimizers, optimizers.optimizer),
        "loader": (opacus.data_loader,),
    }
    ours, theirs = made(PrivacyEngine), of_opacus()
    for owner, table in REFUSED.items():
        known = theirs[owner] | in_the_code_of(*rooms[owner]) | public(ours[owner])
        assert set(table) <= known


def test_the_how_to_lists_what_is_refused():
    """All of it, with the reasons that the errors give; else the table to put there is shown."""
    found = re.search(r"<!-- refused -->\n(.*?)<!-- /refused -->", PAGE.read_text(), re.DOTALL)
    lines = ["| of | name | why, and what to do |", "|---|---|---|"]
    for owner, table in REFUSED.items():
        for reason in dict.fromkeys(table.values()):
            names = ", ".join(f"`{name}`" for name in table if table[name] == reason)
            lines.append(f"| {owner} | {names} | {reason} |")
    assert found[1] == "\n".join(lines) + "\n"


SCHEDULES = {
    "ExponentialNoise": {"gamma": 0.5},
    "LambdaNoise": {"noise_lambda": lambda epoch: 0.5**epoch},
    "StepNoise": {"step_size": 1, "gamma": 0.5},
    "ExponentialGradClip": {"gamma": 0.5},
    "LambdaGradClip": {"scheduler_function": lambda epoch: 0.5**epoch},
    "StepGradClip": {"step_size": 1, "gamma": 0.5},
}


def test_every_schedule_of_opacus_moves_what_it_moves_there():
    """And its state goes into another training."""
    exported = {name for name, kind in vars(schedulers).items() if inspect.isclass(kind)}
    assert {name for name in exported if not name.startswith("_")} == set(SCHEDULES)
    for name, settings in SCHEDULES.items():
        followed = "noise_multiplier" if name.endswith("Noise") else "max_grad_norm"
        optimizer = made(PrivacyEngine)["optimizer"]
        schedule = getattr(schedulers, name)(optimizer, **settings)
        schedule.step()
        assert getattr(optimizer, followed) == 0.5
        other = made(PrivacyEngine)["optimizer"]
        again = getattr(schedulers, name)(other, **settings)
        state = {key: value for key, value in schedule.state_dict().items() if key != "optimizer"}
        again.load_state_dict(state)
        again.step()
        assert again.last_epoch == 2


def test_every_accountant_of_opacus_is_offered_or_refused_by_name():
    """What is no bound is refused; one that a user registers is no bound that we know of."""
    for mechanism, kind in _ACCOUNTANTS.items():
        engine = PrivacyEngine(accountant=mechanism)
        if mechanism == "gdp":
            with pytest.warns(UserWarning, match="GDP"):
                assert isinstance(engine.accountant, accountants.GaussianAccountant)
            with pytest.raises(PlanError, match=r"accountant: expected one of prv, rdp .*gdp"):
                made(lambda engine=engine: engine)
        else:
            assert isinstance(engine.accountant, kind)
            assert public(kind()) <= public(engine.accountant)
