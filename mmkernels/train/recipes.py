"""How Perceiver and Perceiver IO were trained, by name (Jaegle et al. 2021, section 4; 2022, appendices D to I)."""

import dataclasses

OF_THE_LOSS = ("label_smoothing", "mixup", "cutmix")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is published of a training; `settings` makes it one of this package."""

    learning_rate: float
    batch_size: int
    epochs: int | None = None
    steps: int | None = None  # in place of epochs
    optimizer: str = "lamb"
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 0
    flat: float = 0.0
    milestones: tuple = ()
    # Of the loss of a classification
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution of the weights; 0: none
    cutmix: bool = False

    def settings(self, **changes):
        """The `loop.Settings` of it, with `changes`: all but what belongs to the loss."""
        from .loop import Settings  # brings torch, which a list of options does not need

        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in OF_THE_LOSS}
        return Settings(**{**own, **changes})


RECIPES = {
    "perceiver-imagenet": Recipe(4e-3, 1024, epochs=120, schedule="steps", milestones=(84 / 120, 102 / 120, 114 / 120)),
    "perceiver-modelnet40": Recipe(1e-3, 512, steps=50_000, schedule="constant"),
    "perceiver-io-imagenet": Recipe(
        *(2e-3, 1024), epochs=110, flat=0.5, weight_decay=0.1, clip_norm=10.0, label_smoothing=0.1, mixup=0.2, cutmix=True
    ),
    "perceiver-io-jft": Recipe(3e-4, 8192, epochs=14, weight_decay=0.1),
    "perceiver-io-mlm": Recipe(1.25e-3, 2048, steps=500_000, warmup_steps=1000, weight_decay=0.01),
    # The best of four learning rates, 1e-4, 5e-5, 2e-5 and 1e-5, and of three batch sizes, 16, 32 and 64.
    "perceiver-io-glue": Recipe(5e-5, 32, epochs=10, warmup_steps=200, weight_decay=0.01),
    "perceiver-io-flow": Recipe(4e-4, 512, epochs=480),
    "perceiver-io-kinetics": Recipe(1e-3, 1024, epochs=100),  # how long is not said
}
