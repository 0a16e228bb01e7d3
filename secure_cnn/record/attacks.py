"""What each membership attack does, in a sentence: the same on a page and in the documents."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["MEMBERSHIP_ATTACKS_IN_WORDS"]

_OFFLINE = "As {}, with those shadow models alone that were trained without the image."

MEMBERSHIP_ATTACKS_IN_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "global-threshold": "How sure the model is of the right class, with one threshold for all "
        "images: what shadow models say of an image is not used.",
        "attack-p": "Of how many images in nobody's data the model is less sure than of this one.",
        "attack-r": "How many of the shadow models that were trained without the image are less "
        "sure of it: so few values that many images tie.",
        "lira": "LiRA, a likelihood ratio: whether the model is as sure of the image as shadow "
        "models trained with it, or as those trained without it; how much models scatter is "
        "measured over all images.",
        "lira-offline": _OFFLINE.format("lira"),
        "lira-own-variance": "LiRA as it was published, where the scatter is measured for each "
        "image: for 64 shadow models and more; of 2 it is lira.",
        "rmia": "RMIA: over how many images in nobody's data this one stands out, each held "
        "against what models think of it on average.",
        "rmia-offline": _OFFLINE.format("rmia"),
        "base": "BASE: how much surer the model is of the image than models are on average.",
        "base-offline": _OFFLINE.format("base"),
        "bavaria": "BaVarIA: as lira, but what a few shadow models say of one image is weighed "
        "with what they say of all, which tells more where there are few.",
        "bavaria-offline": _OFFLINE.format("bavaria"),
        "augmentation-votes": "Of the class alone: in how many shifted views of the image it is "
        "right.",
        "noise-votes": "Of the class alone: in how many noisy views of the image it is right.",
        "boundary": "Of the class alone: how much the image must be changed until the class "
        "changes.",
    }
)
"""By name, whatever `secure-cnn leakage --attacks` takes."""
