"""Recipes and what the loop has for them: schedules and LAMB."""

import math

import pytest
import torch

from mmkernels.train.loop import Settings, learning_rate, make_optimizer
from mmkernels.train.recipes import RECIPES


def rates(name, steps, **changes):
    settings = RECIPES[name].settings(learning_rate=1.0, **changes)
    return [learning_rate(settings, step, steps) for step in range(steps)]


def test_schedules_of_the_recipes():
    flat = rates("perceiver-io-imagenet", 110)
    assert flat[:56] == [1.0] * 56 and flat[82] == pytest.approx(0.5, abs=0.02) and 0 < flat[-1] < 1e-3
    assert flat == sorted(flat, reverse=True)
    falls = rates("perceiver-imagenet", 120)
    assert [falls[epoch] for epoch in (0, 83, 84, 101, 102, 113, 114, 119)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    warm = rates("perceiver-io-mlm", 10_000)
    assert warm[0] == pytest.approx(1e-3) and max(warm) == warm[warm.index(max(warm))] and 900 < warm.index(max(warm)) < 1000
    assert warm[5000] == pytest.approx(0.5, abs=1e-3) and warm[-1] < 1e-6
    assert set(rates("perceiver-modelnet40", 7)) == {1.0}
    assert rates("perceiver-io-flow", 8) == [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]


def test_recipes_are_the_published_ones():
    io = RECIPES["perceiver-io-imagenet"]
    assert (io.learning_rate, io.weight_decay, io.clip_norm, io.label_smoothing, io.mixup) == (2e-3, 0.1, 10.0, 0.1, 0.2)
    settings = io.settings(epochs=3, batch_size=8)
    assert settings == Settings(3, 8, 2e-3, 0.1, 0, 10.0, optimizer="lamb", beta2=0.999, flat=0.5)
    assert all(recipe.optimizer == "lamb" and (recipe.epochs is None) != (recipe.steps is None) for recipe in RECIPES.values())


def test_lamb_is_the_papers():
    """Five steps of a matrix, a vector and a vector of zeros against the algorithm in float64 (You et al. 2020)."""
    torch.manual_seed(0)
    lr, decay, beta1, beta2 = 0.01, 0.3, 0.9, 0.99
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(20 * torch.randn(6, 5))  # its norm is above 10
    model.vector = torch.nn.Parameter(torch.randn(5))
    settings = Settings(1, 1, lr, decay, optimizer="lamb", beta2=beta2)
    optimizer = make_optimizer(model, settings)
    wanted = {name: p.detach().double() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in wanted.items()} for _ in range(2))
    for _ in range(5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            grad = parameter.grad.double()
            first[name] = beta1 * first[name] + (1 - beta1) * grad
            second[name] = beta2 * second[name] + (1 - beta2) * grad.square()
            step = first[name] / (second[name].sqrt() + 1e-6)
            step = step + (decay if parameter.dim() > 1 else 0.0) * wanted[name]
            wanted[name] = wanted[name] - lr * wanted[name].norm() / step.norm() * step
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_lamb_moves_what_is_zero():
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)
    optimizer = make_optimizer(model, Settings(1, 1, 0.01, optimizer="lamb"))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert model.bias.abs().min() > 0
