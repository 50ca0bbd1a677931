"""Recipes and what the loop has for them: schedules and LAMB."""

import argparse
import math

import pytest
import torch

from mmkernels.models import perceiver, perceiver_io
from mmkernels.train import cli, perceiver_cli
from mmkernels.train.loop import Settings, learning_rate, make_optimizer
from mmkernels.train.recipes import OTHERS, RECIPES


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
    assert io.randaugment == RECIPES["perceiver-imagenet"].randaugment == (4, 5) and io.cutmix
    fine = RECIPES["perceiver-io-jft-fine-tune-conv"]
    assert (fine.learning_rate, fine.steps) == (2e-4, 70_000 + 61_000) and fine.flat * fine.steps == pytest.approx(70_000)
    for name, recipe in RECIPES.items():
        assert (recipe.epochs is None) != (recipe.steps is None)
        assert recipe.optimizer == ("adamw" if name == "perceiver-small" else "lamb")
        assert recipe.config in perceiver_io.CONFIGS or recipe.config in perceiver.CONFIGS


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_of_a_command(name):
    """And its options, where none is given, are its own."""
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    systems = parser._subparsers._group_actions[0].choices["train"]._subparsers._group_actions[0].choices
    owners = [s for s, p in systems.items() for a in p._actions if a.dest == "recipe" and name in a.choices]
    assert owners
    wanted = [option for a in systems[owners[0]]._actions if a.required for option in (a.option_strings[0], "PATH")]
    arguments = parser.parse_args(["train", owners[0], *wanted, "--recipe", name])
    found = perceiver_cli.settled(arguments)
    recipe = RECIPES[name]
    settings = perceiver_cli.settings_of(found)
    every = None if recipe.steps is None else recipe.steps // 10
    assert settings == recipe.settings(seed=0, evaluate_every=every) and found.config == recipe.config
    for field in OTHERS:
        assert getattr(found, field, getattr(recipe, field)) == getattr(recipe, field)


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
