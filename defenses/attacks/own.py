"""The attacks that are written here, by name: one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from defenses.attacks import apgd, carlini_wagner, deepfool, elastic_net, fab, pgd, square
from defenses.attacks.settings import Setting
from defenses.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from defenses.attacks.attack import Search

__all__ = ["OWN", "Own", "own_attack"]


@final
@dataclass(frozen=True, kw_only=True)
class Own:
    """An attack written here: where it lives, what it takes and what it does.

    Attributes:
        norms: In which it is ours.
        settle: From what was given to every setting and its reach.
        search: What it does.
        targeted: Whether it can seek a class that it is given.
        adapts: What a user may bring of their own: `"loss"`, `"surrogate"`, both or nothing.
    """

    norms: tuple[Norm, ...]
    settle: Callable[[ThreatModel, Mapping[str, Setting]], tuple[dict[str, Setting], float]]
    search: "Search"
    targeted: bool
    adapts: tuple[str, ...] = ()


def own_attack(name: str, norm: Norm) -> Own | None:
    """Our own attack of this name in this norm, if there is one."""
    row = OWN.get(name)
    return row if row is not None and norm in row.norms else None


OWN: Mapping[str, Own] = {
    "apgd": Own(
        norms=("linf", "l2", "l1"),
        settle=apgd.settle,
        search=apgd.search,
        targeted=True,
        adapts=("loss", "surrogate"),
    ),
    "apgdt": Own(
        norms=("linf", "l2", "l1"),
        settle=apgd.settle_targets,
        search=apgd.search_targets,
        targeted=False,
        adapts=("surrogate",),
    ),
    "cw": Own(
        norms=("l2",), settle=carlini_wagner.settle, search=carlini_wagner.search, targeted=True
    ),
    "deepfool": Own(
        norms=("linf", "l2"), settle=deepfool.settle, search=deepfool.search, targeted=False
    ),
    "eaden": Own(
        norms=("l1",),
        settle=elastic_net.settle_elastic_net,
        search=elastic_net.search_elastic_net,
        targeted=True,
    ),
    "eadl1": Own(
        norms=("l1",), settle=elastic_net.settle_l1, search=elastic_net.search_l1, targeted=True
    ),
    "fab": Own(norms=("linf", "l2", "l1"), settle=fab.settle, search=fab.search, targeted=False),
    "fab-untargeted": Own(
        norms=("linf", "l2", "l1"),
        settle=fab.settle_untargeted,
        search=fab.search_untargeted,
        targeted=False,
    ),
    "ffgsm": Own(norms=("linf",), settle=pgd.settle_ffgsm, search=pgd.search_ffgsm, targeted=True),
    "fgsm": Own(norms=("linf",), settle=pgd.settle_fgsm, search=pgd.search_fgsm, targeted=True),
    "n-fgsm": Own(
        norms=("linf",), settle=pgd.settle_n_fgsm, search=pgd.search_n_fgsm, targeted=True
    ),
    "pgd": Own(
        norms=("linf", "l2"),
        settle=pgd.settle_pgd,
        search=pgd.search_pgd,
        targeted=True,
        adapts=("loss", "surrogate"),
    ),
    "square": Own(
        norms=("linf", "l2", "l1"), settle=square.settle, search=square.search, targeted=True
    ),
}
