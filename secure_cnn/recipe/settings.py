"""The recipe: what to train and with which protections, in one frozen value of plain settings.

No key and no data is in it, so that it can be written into every record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from defenses import AdversarialTraining, GaussianAugmentation, ThreatModel, adversarial_objective
from defenses.quantities import shown
from defenses.training.objective import Precision
from secure_cnn.data import ImageData, ImageReading, load_data
from secure_cnn.data.reading import Fit
from secure_cnn.engine import Objective
from secure_cnn.errors import RunError
from secure_cnn.recipe import defaults, ranges
from secure_cnn.recipe.clashes import CLASHES
from secure_cnn.recipe.ranges import AUTO, ClippingKind, HeadKind, Norm, Optimizer, Unit
from secure_cnn.recipe.variant import Variant

__all__ = ["Recipe", "images_stay"]

_ADDED = (
    *("clipping", "float_safe", "copies", "attack_noise"),
    *("image_size", "image_fit", "background", "checkpoint_minutes"),
    *("model_options", "weights", "train_only", "freeze"),
    *("unit", "images_per_person", "groups"),
    *("shards", "slices", "head", "penalty"),
)
"""Settings that earlier versions did not write down: their runs had the defaults of these."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train; DP-SGD is off without `epsilon`, adversarial training without `eps`.

    Attributes:
        data: Name of a data set, a folder of class folders, or a `.npz` file.
        image_size: The size to which a folder's images are brought, one number or
            `HEIGHTxWIDTH`; None leaves them as they are.
        image_fit: How one of another shape is: `crop`, `pad` or `stretch`; see
            `secure_cnn.data.ImageReading`.
        background: The colour behind transparent places and beside padded images.
        model: One of `MODELS`, or the name of an `OwnNetwork`, which is then given to `run`; `auto`
            chooses by protections and images, see `secure_cnn.recipe.defaults`.
        model_options: Those of that network.
        weights: File of weights to start from: safetensors, sealed (opened by what is given to
            `run`), or of `torch.save`. What the file does not have in the model's shape is drawn.
        train_only: Patterns, such as `head.*`, of the parameters that are trained; none trains all.
        freeze: Patterns of those that are not.
        epochs: Passes over the training images. In a private training more are more steps, each
            with more noise, since epsilon stays what it is.
        batch_size: Images a step, in a private training those expected; None chooses by the data
            and the number of epochs, see `secure_cnn.recipe.defaults`.
        optimizer: `sgd` (with momentum 0.9), `adamw`, or `muon`, see `secure_cnn.optimizers.Muon`.
        learning_rate: At its peak; None chooses by optimizer, in a private training also by its
            steps and `max_grad_norm`.
        clip_grad_norm: Largest norm of a step's mean gradient where it is not private; 0 leaves
            gradients as they are. (Private ones are clipped example by example.)
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        average_decay: Of the moving average of the weights, in [0, 1); 0 switches it off.
        shift: Largest random shift of the images, in pixels.
        epsilon: Privacy budget; None trains without DP-SGD.
        delta: Its delta; None chooses the smaller of 1e-5 and a tenth of 1 / samples.
        max_grad_norm: Clipping norm; where it is adaptive, that of the first step.
        clipping: How each example's gradient is clipped: `flat` (as a whole), `automatic` (scaled
            to about the norm, so that all count alike), `per-layer`, or `adaptive` (the norm
            follows the examples, and what that tells is paid for); see `privacy.DPPlan`.
        float_safe: Whether sum and noise are added on one grid, so that the low bits of floats
            leak nothing; takes time, see `privacy.DPPlan`.
        unit: What epsilon protects as one: an `example`, or a `person` with all images of theirs.
            Epochs and batch size are of persons then; see `privacy.DPPlan`.
        images_per_person: Most images of one person in a step; None takes the plan's own, 8.
        groups: Whose the images are: `folder` (`<class>/<person>/*.jpg`) or a CSV file, see
            `load_data`; None where the data set says so itself, or nobody asks. Then a person's
            images are all trained on, or all tested on.
        copies: Augmented copies of each example in a private step, whose gradients are averaged
            before they are clipped (De et al. 2022, arXiv 2204.13650): at no cost in epsilon, and
            as much work as so many steps. More than 1 needs `shift`, `flip`, `eps` or
            `gaussian_sigma`, which make the copies differ.
        eps: Size of the perturbation; None trains without adversarial examples.
        eps_warmup: Share of the steps in which the perturbation grows to `eps`, in [0, 1).
        attack: How they are trained on: `n-fgsm`, `ffgsm`, `fgsm`, `pgd`, `trades`, `mart`, or
            `free`, which takes each batch several times in a row and so sees fewer of them; None
            chooses `n-fgsm` when `eps` is given.
        attack_steps: Steps of an iterative attack, or replays of `free`; None takes its own.
        attack_noise: The uniform noise that `n-fgsm` starts from, in multiples of `eps`; None takes
            its own, 2. More keeps training from collapsing.
        attack_precision: Of the convolutions within the attack, `float32` or `bfloat16`, which is
            faster where the processor has matrix units for it. Not of `free` and `trades`.
        gaussian_sigma: Trains on images with fresh Gaussian noise of this standard deviation, for a
            certificate of the same sigma; in the units of the pixels. Not with `eps`.
        guard: Whether training on single steps (`n-fgsm`, `ffgsm`, `fgsm`) is watched for
            catastrophic overfitting, after each epoch and on a few training images: then it is
            taken back to the last good epoch, and goes on with more noise. It was tuned on digits
            and can cost accuracy elsewhere. Not in a private training, whose epsilon would not
            cover the decision.
        trials: How many settings were tried on these private data, this one among them. It is
            written down beside epsilon, which does not charge it; None says that it is not known.
        shards: Into how many parts the images are cut, each with a network of its own, so that
            forgetting an image concerns one of them; see `secure_cnn.unlearning`.
        slices: Into how many parts each shard is cut; from the last one forgetting is cheapest.
        head: How the last layer is trained: by the steps of all others (`gradient`), or by least
            squares (`ridge`), from which people leave exactly and at once; of the networks
            `handcrafted`, `nonexpansive` and `scattering`, whose other layers are formulas, and
            without a setting that is for steps.
        penalty: Of the squared weights of `ridge`, beside the sum of the squared errors of all
            images; None takes the network's usual one.
        robust_samples: Test images that are attacked at the end; None takes all.
        baseline: Whether a protected run also trains the same network without protections, to show
            what they cost.
        checkpoint_minutes: After how many minutes within an epoch the training under way is saved,
            besides at the end of each epoch; 0 saves it there alone.
        seed: Of everything that is not secret.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        RunError: A setting is of another type, out of range, or contradicts another.
        DataError: `image_size`, `image_fit` or `background` cannot be.
        ModelError: There is no such model.
        PlanError: `epsilon`, `delta` or `max_grad_norm` is none.
        DefenseError: `eps`, the attack or one of its settings, or `gaussian_sigma` cannot be.

    Example:
        >>> recipe = Recipe(data="fashion-mnist", epsilon=3.0, eps=0.1, out="runs/1")
        >>> recipe.variant.name, [variant.name for variant in recipe.variants]
        ('private+n-fgsm', ['plain', 'private+n-fgsm'])
    """

    out: str | Path
    data: str = "digits"
    image_size: int | str | None = None
    image_fit: Fit = "crop"
    background: str = "white"
    model: str = AUTO
    model_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weights: str | Path | None = None
    train_only: Sequence[str] = ()
    freeze: Sequence[str] = ()
    epochs: int = 20
    batch_size: int | None = None
    optimizer: Optimizer = "sgd"
    learning_rate: float | None = None
    clip_grad_norm: float = defaults.CLIP_GRAD_NORM
    weight_decay: float = 0.0
    warmup: float = 0.1
    label_smoothing: float = 0.0
    average_decay: float = 0.99
    shift: int = 0
    flip: bool = False
    epsilon: float | None = None
    delta: float | None = None
    max_grad_norm: float = 1.0
    clipping: ClippingKind = "flat"
    float_safe: bool = False
    unit: Unit = "example"
    images_per_person: int | None = None
    groups: str | Path | None = None
    copies: int = 1
    eps: float | None = None
    eps_warmup: float = 0.0
    attack: str | None = None
    norm: Norm = "linf"
    attack_steps: int | None = None
    attack_noise: float | None = None
    attack_precision: Precision = "float32"
    gaussian_sigma: float | None = None
    guard: bool = False
    trials: int | None = None
    shards: int = 1
    slices: int = 1
    head: HeadKind = "gradient"
    penalty: float | None = None
    robust_samples: int | None = 1000
    baseline: bool = True
    checkpoint_minutes: float = 10.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, (fits, expected) in ranges.RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                got = value if isinstance(value, str) and name in ranges.WORDS else shown(value)
                raise ranges.ERRORS.get(name, RunError)(f"{name}: expected {expected}, got {got}")
        object.__setattr__(self, "out", str(self.out))
        object.__setattr__(self, "data", str(self.data))
        if self.groups is not None:
            object.__setattr__(self, "groups", str(self.groups))
        if self.reading.shape is not None:
            # However it was written, the record has one form of it.
            object.__setattr__(self, "image_size", "x".join(map(str, self.reading.shape)))
        for clashes, message in CLASHES:
            if clashes(self):
                raise RunError(message.format(r=self))
        object.__setattr__(self, "model_options", dict(self.model_options))
        if self.weights is not None:
            object.__setattr__(self, "weights", str(self.weights))
        for name in ("train_only", "freeze"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # Attacks and threat models know their own ranges: what they refuse is refused here.
        self.robust_objective()

    @cached_property
    def reading(self) -> ImageReading:
        """How a folder's images are read."""
        return ImageReading(size=self.image_size, fit=self.image_fit, background=self.background)

    @property
    def is_sharded(self) -> bool:
        """Whether it is trained so that images can be forgotten."""
        return self.shards * self.slices > 1

    def images(self) -> ImageData:
        """The images that it names, read and split as it says.

        Raises:
            DataError: They are not there, or cannot be read so.
        """
        return load_data(self.data, reading=self.reading, groups=self.groups, seed=self.seed)

    @cached_property
    def threat(self) -> ThreatModel | None:
        """The one threat model of the run, where the recipe names one."""
        return None if self.eps is None else ThreatModel(norm=self.norm, eps=self.eps)

    def robust_objective(self) -> Objective | None:
        """What a training with changed images minimises, anew; None where nothing changes them."""
        if self.gaussian_sigma is not None:
            return GaussianAugmentation(
                sigma=self.gaussian_sigma, seed=self.seed, label_smoothing=self.label_smoothing
            )
        method = self.variant.method
        if self.threat is None or method is None:
            return None
        objective = adversarial_objective(
            method,
            self.threat,
            steps=self.attack_steps,
            precision=self.attack_precision,
            seed=self.seed,
            label_smoothing=self.label_smoothing,
        )
        if self.attack_noise is not None:
            cast(AdversarialTraining, objective).noise = self.attack_noise
        return objective

    @property
    def variant(self) -> Variant:
        """The training that the recipe asks for."""
        method = (self.attack or "n-fgsm") if self.eps is not None else None
        if self.gaussian_sigma is not None:
            method = "gaussian"
        return Variant(private=self.epsilon is not None, method=method)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All trainings of the run, the recipe's own last."""
        plain = Variant(private=False, method=None)
        return (plain, self.variant) if self.baseline and self.variant != plain else (self.variant,)

    def batch_size_for(self, variant: Variant, samples: int) -> int:
        """Images a step, the recipe's own or the variant's usual."""
        if self.batch_size is not None:
            return self.batch_size
        return defaults.batch_size(samples, self.epochs, private=variant.private, model=self.model)

    def learning_rate_for(self, variant: Variant, steps: int, *, noise: float = 0.0) -> float:
        """The peak learning rate, the recipe's own or the usual one of so many steps.

        `noise` is that of a private step, as a share of what its images can add up to.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        norm = self.max_grad_norm if variant.private else None
        return defaults.learning_rate(
            self.optimizer, steps=steps, max_grad_norm=norm, model=self.model, noise=noise
        )

    def on(self, data: ImageData) -> "Recipe":
        """With the model that is usual for it on these images, and its penalty, if it names none.

        Of `ridge` alone there is a penalty.
        """
        if self.head == "ridge":
            name = defaults.RIDGE_MODEL if self.model == AUTO else self.model
            penalty = defaults.PENALTIES[name] if self.penalty is None else self.penalty
            return replace(self, model=name, penalty=penalty)
        if self.model != AUTO:
            return self
        brought = self.weights is not None or self.train_only or self.freeze
        head = self.variant.private and images_stay(self, self.variant) and not brought
        images = len(data.train) + len(data.test)
        return replace(self, model=defaults.model(images, data.spec.shape, head=head))

    def delta_for(self, samples: int) -> float:
        """The delta of a private training on so many samples."""
        return defaults.delta(samples) if self.delta is None else self.delta

    def changed_from(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of the settings, but `out`, that differ from those of an earlier run."""
        own, before = self.to_dict(), Recipe(out="").to_dict()
        settings = {**{name: before[name] for name in _ADDED}, **settings}
        # What `auto` came to is on record, and is chosen again.
        unsaid = {"out", "model"} if self.model == AUTO else {"out"}
        names = sorted({*own, *settings} - unsaid)
        return [n for n in names if n not in own or n not in settings or own[n] != settings[n]]

    def check_unchanged(self, settings: Mapping[str, Any]) -> None:
        """Refuses the settings of a training's state that are not these, but for `out`."""
        defaults.check_same(settings, "checkpoint")
        changed = self.changed_from(settings)
        if changed:
            raise RunError(
                f"checkpoint: it was trained with another {', '.join(changed)}; resume with the "
                "settings it was trained with"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**asdict(self), "train_only": [*self.train_only], "freeze": [*self.freeze]}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """Reads back what `to_dict` gave; settings that are missing have their defaults."""
        if not isinstance(settings, Mapping) or "out" not in settings:
            raise RunError(
                f"settings: expected those of to_dict(), with `out`, got {shown(settings)}"
            )
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown:
            raise RunError(
                f"settings: unknown {', '.join(unknown)}; the run was made by another version"
            )
        return cls(**settings)


def images_stay(recipe: Recipe, variant: Variant) -> bool:
    """Whether a training shows the model every image as it is, in every epoch.

    Example:
        >>> recipe = Recipe(out="runs/1", eps=0.1)
        >>> [images_stay(recipe, each) for each in recipe.variants]
        [True, False]
    """
    changed = variant.method is not None or recipe.flip or recipe.shift > 0
    return not changed and recipe.copies == 1
