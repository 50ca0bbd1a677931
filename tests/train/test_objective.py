"""The losses, mixup and metrics of MBT's recipe against their formulas."""

import pytest
import torch

from mmkernels.train import loop
from mmkernels.train.objective import Objective, clip_logits, mix

B, C = 4, 5
torch.manual_seed(0)
LOGITS = {"rgb": torch.randn(B, C), "spectrogram": torch.randn(B, C)}
TARGETS = torch.eye(C)[[0, 2, 2, 4]]


class Fixed(torch.nn.Module):
    """Answers with what it was made with, and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, inputs):
        self.inputs = inputs
        return self.answer


def batch():
    return {name: torch.randn(B, 3, generator=torch.Generator().manual_seed(1)) for name in LOGITS}, TARGETS


def test_softmax_with_label_smoothing():
    s = 0.3
    smooth = torch.where(TARGETS == 1, 1 - s + s / C, s / C)
    expected = torch.stack([-(smooth * z.log_softmax(-1)).sum(-1).mean() for z in LOGITS.values()]).mean()
    assert torch.allclose(Objective((C,), label_smoothing=s)(Fixed(LOGITS), batch()), expected)


def test_sigmoid_is_summed_over_classes():
    targets = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.stack(
        [-(targets * z.sigmoid().log() + (1 - targets) * (1 - z.sigmoid()).log()).sum(-1).mean() for z in LOGITS.values()]
    ).mean()
    inputs, _ = batch()
    assert torch.allclose(Objective((C,), multi_label=True)(Fixed(LOGITS), (inputs, targets)), expected)


def test_split_classes():
    targets = torch.cat([torch.eye(2)[[0, 1, 1, 0]], torch.eye(3)[[2, 0, 1, 1]]], -1)
    z = LOGITS["rgb"]
    verb = torch.nn.functional.cross_entropy(z[:, :2], torch.tensor([0, 1, 1, 0]))
    noun = torch.nn.functional.cross_entropy(z[:, 2:], torch.tensor([2, 0, 1, 1]))
    inputs, _ = batch()
    assert torch.allclose(Objective((2, 3))(Fixed(z), (inputs, targets)), (verb + noun) / 2)


@pytest.mark.parametrize("mixmod", [False, True])
def test_mixup(mixmod):
    inputs, targets = batch()
    torch.manual_seed(5)
    mixed, weights = mix(inputs, 0.5, mixmod)
    assert (weights["rgb"] == weights["spectrogram"]) != mixmod
    for name, weight in weights.items():
        assert torch.allclose(mixed[name], weight * inputs[name] + (1 - weight) * inputs[name].flip(0))
    model = Fixed(LOGITS)
    torch.manual_seed(5)
    loss = Objective((C,), mixup=0.5, mixmod=mixmod)(model, (inputs, targets))
    assert all(torch.equal(model.inputs[name], mixed[name]) for name in inputs)
    expected = [
        -((w * targets + (1 - w) * targets.flip(0)) * LOGITS[name].log_softmax(-1)).sum(-1).mean()
        for name, w in weights.items()
    ]
    assert torch.allclose(loss, torch.stack(expected).mean())


def test_mixmod_needs_logits_of_every_modality():
    with pytest.raises(ValueError, match="mixmod needs a model with logits of its own"):
        Objective((C,), mixup=0.5, mixmod=True)(Fixed(LOGITS["rgb"]), batch())


def test_mixup_weights_follow_the_beta_distribution():
    torch.manual_seed(0)
    draws = torch.tensor([mix({"a": torch.zeros(1)}, 0.5, False)[1]["a"] for _ in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.var() - 1 / 8) < 0.01  # Beta(a, a): 1 / (4 (2 a + 1))


def logits_of(rows):
    """A model that answers with the first entries of its input, and batches of it: two windows a clip, around `rows`."""
    rows = torch.tensor(rows)
    spread = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    windows = torch.stack([rows + spread, rows - spread], 1)
    return (lambda inputs: inputs["a"]), windows


def test_logits_are_averaged_over_windows():
    rows = [[1.0, 2, 3], [4.0, 5, 6]]
    model, windows = logits_of(rows)
    assert torch.allclose(clip_logits(model, {"a": windows}), torch.tensor(rows))


def test_accuracy_and_top5():
    rows = [[9.0, 1, 2, 3, 4, 5], [1.0, 9, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]]
    model, windows = logits_of(rows)
    targets = torch.eye(6)[[0, 0, 4, 0]]
    found = Objective((6,), label_smoothing=0.5).evaluate(
        model, [({"a": windows[:3]}, targets[:3]), ({"a": windows[3:]}, targets[3:])]
    )
    assert list(found) == ["accuracy", "top5", "held_out_loss"]
    # Right: the first. Among five: not the second (last of six) and not the fourth.
    assert found["accuracy"] == 0.25 and found["top5"] == 0.5
    expected = torch.nn.functional.cross_entropy(torch.tensor(rows), targets)
    assert found["held_out_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_both_heads_must_be_right():
    model, windows = logits_of([[9.0, 0, 9, 0], [9.0, 0, 0, 9], [0.0, 9, 9, 0]])
    targets = torch.cat([torch.eye(2)[[0, 0, 0]], torch.eye(2)[[0, 0, 0]]], -1)
    found = Objective((2, 2)).evaluate(model, [({"a": windows}, targets)])
    assert list(found)[0] == "accuracy" and found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_0"] == pytest.approx(2 / 3) and found["accuracy_1"] == pytest.approx(2 / 3)


def test_mean_average_precision():
    rows = [[3.0, 1, 0], [2.0, 2, 0], [1.0, 3, 0], [0.0, 4, 0]]
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])  # no example of the third class
    model, windows = logits_of(rows)
    found = Objective((3,), multi_label=True).evaluate(model, [({"a": windows}, targets)])
    # Ranks of the positives: class 0 at 1 and 3 of 4, class 1 at 3.
    assert found["map"] == pytest.approx(((1 / 1 + 2 / 3) / 2 + 1 / 3) / 2)


def test_sgd_has_momentum():
    layer = torch.nn.Linear(2, 1)
    settings = loop.Settings(epochs=1, batch_size=1, learning_rate=0.5, weight_decay=0.0, optimizer="sgd")
    optimizer = loop.make_optimizer(layer, settings)
    start = layer.weight.detach().clone()
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.ones_like(layer.weight), torch.zeros_like(layer.bias)
        optimizer.step()
    assert torch.allclose(start - layer.weight, torch.full_like(start, 0.5 * (1 + 1.9)))
