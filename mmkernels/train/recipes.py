"""How Perceiver and Perceiver IO were trained, by name (Jaegle et al. 2021, section 4; 2022, appendices D to I)."""

import dataclasses

# What belongs to the model, the data or the loss, and not to the loop.
OTHERS = ("config", "label_smoothing", "mixup", "cutmix", "randaugment", "crop", "flip", "video_dropout", "label_weight")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is published of a training; `settings` makes it one of this package."""

    config: str  # of the model that it was published with, or the first of several
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
    # Of the classification of images
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution of the weights; 0: none
    cutmix: bool = False
    randaugment: tuple = (0, 0)  # how many operations an image gets, and how strong they are, of 10
    crop: float = 0.0  # least share of an image's area that a random crop shows; 0: no crops
    flip: bool = False  # half of the images are mirrored left to right
    # Of clips
    video_dropout: float = 0.0  # how often a model is not shown the pictures of a clip
    label_weight: float = 1e-4  # of the label in the loss of an autoencoder

    def settings(self, **changes):
        """The `loop.Settings` of it, with `changes`: all but what belongs to model, data and loss."""
        from .loop import Settings  # brings torch, which a list of options does not need

        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in OTHERS}
        return Settings(**{**own, **changes})


_CROPPED = {"crop": 0.08, "flip": True}
_AUGMENTED = {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": True, "randaugment": (4, 5), **_CROPPED}
_FINE_TUNED = {"steps": 131_000, "flat": 70 / 131, "weight_decay": 0.1, "clip_norm": 10.0, **_AUGMENTED}
_AUDIOSET = {"epochs": 100, "video_dropout": 0.3}  # rate and batch size are not published
RECIPES = {
    "perceiver-imagenet": Recipe(
        *("perceiver-imagenet", 4e-3, 1024),
        epochs=120,
        schedule="steps",
        milestones=(84 / 120, 102 / 120, 114 / 120),
        randaugment=(4, 5),
        **_CROPPED,
    ),
    # Of small data on small machines: no paper's.
    "perceiver-small": Recipe(
        *("perceiver-small", 1e-3, 32),
        epochs=30,
        optimizer="adamw",
        beta2=0.99,
        weight_decay=0.05,
        clip_norm=1.0,
        warmup_steps=50,
    ),
    "perceiver-audioset": Recipe("perceiver-audioset", 1e-3, 512, **_AUDIOSET),
    "perceiver-modelnet40": Recipe("perceiver-modelnet40", 1e-3, 512, steps=50_000, schedule="constant"),
    "perceiver-io-imagenet": Recipe(
        *("perceiver-io-imagenet-fourier", 2e-3, 1024), epochs=110, flat=0.5, weight_decay=0.1, clip_norm=10.0, **_AUGMENTED
    ),
    "perceiver-io-jft": Recipe("perceiver-io-imagenet-b", 3e-4, 8192, epochs=14, weight_decay=0.1, **_CROPPED),
    # ImageNet after it; the batch is that of a training on ImageNet alone.
    "perceiver-io-jft-fine-tune": Recipe("perceiver-io-imagenet-b", 2e-3, 1024, **_FINE_TUNED),
    "perceiver-io-jft-fine-tune-conv": Recipe("perceiver-io-imagenet-b-conv", 2e-4, 1024, **_FINE_TUNED),
    "perceiver-io-mlm": Recipe(
        "perceiver-io-language-bytes", 1.25e-3, 2048, steps=500_000, warmup_steps=1000, weight_decay=0.01
    ),
    # The best of four learning rates, 1e-4, 5e-5, 2e-5 and 1e-5, and of three batch sizes, 16, 32 and 64.
    "perceiver-io-glue": Recipe("perceiver-io-glue-bytes", 5e-5, 32, epochs=10, warmup_steps=200, weight_decay=0.01),
    "perceiver-io-flow": Recipe("perceiver-io-flow", 4e-4, 512, epochs=480),
    "perceiver-io-kinetics": Recipe("perceiver-io-kinetics", 1e-3, 1024, epochs=100),  # how long is not said
    "perceiver-io-kinetics-label": Recipe("perceiver-io-kinetics", 1e-3, 1024, epochs=100, label_weight=1.0),
    "perceiver-io-audioset": Recipe("perceiver-io-audioset", 1e-3, 512, **_AUDIOSET),
}
