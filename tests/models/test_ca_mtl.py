"""CA-MTL: the released model's tensors, outputs and every gradient; counts, freezing, mixed batches, files, bad input.

Cases lie in `tests/golden/ca_mtl`, and in the folder `ca_mtl` of the one that MMKERNELS_GOLDEN names, in the same layout:
outputs for weights under the released names, and gradients of S, the sum of outputs times their `cotangent`. The numbers are
those of the released code in float32: outputs within 1e-5 + 1e-4 relative, gradients 5e-5 + 1e-3.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmkernels import _library, models, ops, testing
from mmkernels.models import ca_mtl
from mmkernels.modules import ConditionalAttention, ConditionalBottleneck, ConditionalLayerNorm, FiLM, set_backend
from mmkernels.modules.conditional import add_norm

ROOTS = [Path(__file__).parents[1] / "golden" / "ca_mtl"]
if os.environ.get("MMKERNELS_GOLDEN"):
    ROOTS.append(Path(os.environ["MMKERNELS_GOLDEN"]) / "ca_mtl")
BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])


def cases(kind):
    return [pytest.param(path, id=path.name) for root in ROOTS for path in sorted(root.glob(f"{kind}*")) if path.is_dir()]


def read(folder):
    files = ("inputs", "outputs", "weights")
    tensors = [
        load_file(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").is_file() else {} for name in files
    ]
    return json.loads((folder / "config.json").read_text()), *tensors


def close(actual, expected, what, gradient=False):
    atol, rtol = (5e-5, 1e-3) if gradient else (1e-5, 1e-4)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


# --- The released layers ----------------------------------------------------------------------------------------------------


def loaded(module, weights, names, backend=None):
    """`module` with parameters {own name: released name, or names that are joined}, and itself as wanted."""
    parts = {ours: (theirs,) if isinstance(theirs, str) else theirs for ours, theirs in names.items()}
    module.load_state_dict({ours: torch.cat([weights[n] for n in theirs]) for ours, theirs in parts.items()})
    return set_backend(module, backend) if backend else module


def check_gradients(name, output, cotangent, expected, module, names, **tensors):
    tensors = {n: t for n, t in tensors.items() if f"{name}.grad.{n}" in expected}
    found = torch.autograd.grad((output * cotangent).sum(), [*tensors.values(), *module.parameters()])
    for key, grad in zip(tensors, found, strict=False):
        close(grad, expected[f"{name}.grad.{key}"], f"gradient of {key}", True)
    for (ours, _), grad in zip(module.named_parameters(), found[len(tensors) :], strict=True):
        theirs = names[ours]
        parts = [expected[f"{name}.grad.{n}"] for n in ((theirs,) if isinstance(theirs, str) else theirs)]
        close(grad, torch.cat(parts) if len(parts) > 1 else parts[0], f"gradient of {ours}", True)


def pair(ours, theirs):
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", cases("blocks"))
class TestBlocks:
    def inputs(self, folder):
        config, inputs, expected, weights = read(folder)
        x, z = inputs["x"].requires_grad_(), inputs["task_embedding"].requires_grad_()
        return config, inputs, expected, weights, x, z

    def test_film(self, folder, backend):
        config, inputs, expected, weights, x, z = self.inputs(folder)
        size = config["hidden_size"]
        names = pair("linear", "film.gb_weights")
        film = loaded(FiLM(size, size), weights, names)
        out = film(x, z)
        close(out, expected["film"], "film")
        check_gradients("film", out, inputs["cotangent.film"], expected, film, names, task_embedding=z, x=x)

    def test_film_and_layer_norm(self, folder, backend):
        config, inputs, expected, weights, x, z = self.inputs(folder)
        film = loaded(FiLM(config["hidden_size"], config["hidden_size"]), weights, pair("linear", "film_ln.gb_weights"))
        norm = [weights[f"film_ln.layer_norm.{n}"] for n in ("weight", "bias")]
        out = add_norm(film(x, z), *norm, config["film_ln_eps"], None, backend)
        close(out, expected["film_ln"], "film_ln")
        (dx,) = torch.autograd.grad((out * inputs["cotangent.film_ln"]).sum(), x)
        close(dx, expected["film_ln.grad.x"], "gradient of x", True)

    def test_layer_norm(self, folder, backend):
        """Rows of a task are equal, and so one row for each task says all: the released gradient sits on its first row."""
        config, inputs, expected, weights, x, z = self.inputs(folder)
        size = config["hidden_size"]
        names = {n: f"cln.{n}" for n in ("weight", "bias")} | pair("film.linear", "cln.ln_weight_modulation.gb_weights")
        norm = loaded(ConditionalLayerNorm(size, size, eps=config["cln_eps"]), weights, names, backend)
        present, index = inputs["task_id"].unique(return_inverse=True)
        first = torch.tensor([int((index == i).nonzero()[0]) for i in range(len(present))])
        out = norm(x, z[first], index)
        close(out, expected["cln"], "cln")
        check_gradients("cln", out, inputs["cotangent.cln"], expected, norm, names, task_embedding=z, x=x)
        close(norm(x, z), expected["cln"], "a row for each example")

    def test_bias(self, folder, backend):
        """Through zero queries and keys the scores are the bias: weights of -inf elsewhere show one row of it at a time."""
        config, inputs, expected, weights, _, z = self.inputs(folder)
        film = loaded(FiLM(config["hidden_size"], config["block_cols"]), weights, pair("linear", "cbda.gb_weights"))
        bias = ops.BlockDiagonalBias(inputs["matrix"], *film.rows(z))
        length = inputs["matrix"].shape[0]
        close(testing.eager_block_diagonal_bias(*bias, keys=length)[:, 0], expected["cbda"], "cbda")
        zero = torch.zeros(len(z), 1, length, 1)
        values = torch.eye(length).expand(len(z), 1, -1, -1)
        out = ops.attention(zero, zero, values, bias=bias, backend="auto" if backend == "eager" else backend)
        close(out[:, 0], expected["cbda"].softmax(-1), "softmax of cbda")

    def test_bias_gradients(self, folder, backend):
        config, inputs, expected, weights, _, z = self.inputs(folder)
        names = pair("linear", "cbda.gb_weights")
        film = loaded(FiLM(config["hidden_size"], config["block_cols"]), weights, names)
        matrix = inputs["matrix"].requires_grad_()
        out = testing.eager_block_diagonal_bias(matrix, *film.rows(z), keys=matrix.shape[0])[:, 0]
        check_gradients("cbda", out, inputs["cotangent.cbda"], expected, film, names, task_embedding=z, matrix=matrix)

    def test_bottleneck(self, folder, backend):
        config, inputs, expected, weights, x, z = self.inputs(folder)
        size = config["hidden_size"]
        names = pair("transform", "bottleneck.emb_transf") | pair("film.linear", "bottleneck.hidden_modulation.gb_weights")
        names |= pair("down", "bottleneck.down_proj_layer") | pair("up", "bottleneck.up_proj_layer")
        bottleneck = loaded(ConditionalBottleneck(size, size, config["bottleneck_size"]), weights, names)
        out = bottleneck(x, z)
        close(out, expected["bottleneck"], "bottleneck")
        check_gradients("bottleneck", out, inputs["cotangent.bottleneck"], expected, bottleneck, names, task_embedding=z, x=x)

    def test_attention(self, folder, backend):
        config, inputs, expected, weights, x, z = self.inputs(folder)
        size, length = config["hidden_size"], config["max_seq_length"]
        names = {
            f"qkv.{part}": [f"self_attention.{n}.{part}" for n in ("query", "key", "value")] for part in ("weight", "bias")
        }
        names |= pair("film.linear", "self_attention.cond_block_diag_attn.gb_weights")
        names["matrix"] = "self_attention.random_weight_matrix"
        attention = ConditionalAttention(size, size, length, config["block_cols"], num_heads=config["num_heads"])
        loaded(attention, weights, names, backend)
        mask = inputs["extended_attention_mask"][:, 0, 0] == 0
        out = attention(x, z, key_mask=mask)
        close(out, expected["self_attention"], "self_attention")
        grad = inputs["cotangent.self_attention"]
        check_gradients("self_attention", out, grad, expected, attention, names, task_embedding=z, x=x)


# --- The released model ------------------------------------------------------------------------------------------------------


def made(folder, backend, dtype=torch.float32):
    config, inputs, expected, weights = read(folder)
    model = ca_mtl.from_official(config, {n: t.to(dtype) for n, t in weights.items()}, backend=backend).eval()
    arguments = [inputs[n] for n in ("input_ids", "task_id")]
    options = {n: inputs[n] for n in ("attention_mask", "token_type_ids")}
    return config, inputs, expected, model, arguments, options


def of_tasks(output, task_id, num_labels):
    """{task: the logits of its rows}."""
    return {t: output.logits[task_id == t, : num_labels[t]] for t in task_id.unique().tolist()}


def check_released_gradients(model, loss, expected, prefix):
    """Every parameter's gradient; what the file has none of has none, or zero, here."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    names, checked = ca_mtl.official_names(model.config), set()
    for (ours, parameter), grad in zip(model.named_parameters(), found, strict=True):
        theirs = names[ours]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        grad = torch.zeros_like(parameter) if grad is None else grad
        for name, part in zip(theirs, grad.chunk(len(theirs)), strict=True):
            close(part, expected.get(f"{prefix}.{name}", torch.zeros_like(part)), f"{prefix} of {name}", True)
            checked.add(f"{prefix}.{name}")
    assert {name for name in expected if name.startswith(f"{prefix}.")} <= checked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", cases("model"))
def test_released_model(folder, backend):
    config, inputs, expected, model, arguments, options = made(folder, backend)
    states = []
    for module in (model.alignment, *model.layers):
        module.register_forward_hook(lambda module, args, out: states.append(out[1] if isinstance(out, tuple) else out))
    output = model(*arguments, **options)
    close(output.sequence, expected["sequence_output"], "sequence")
    close(output.pooled, expected["pooled_output"], "pooled")
    base = config["encoder"].endswith("base")
    for i, state in enumerate(states[:-1] if base else states):  # the last one of base is modulated for its bottleneck
        close(state, expected[f"hidden_states.{i}"], f"hidden state {i}")
    assert len(states) == config["num_hidden_layers"] + 1
    logits = of_tasks(output, arguments[1], model.config.num_labels)
    for task, own in logits.items():
        close(own, expected[f"logits.{task}"], f"logits of task {task}")
    total = (output.sequence * inputs["cotangent.sequence_output"]).sum()
    total = total + sum((own * inputs[f"cotangent.logits.{task}"]).sum() for task, own in logits.items())
    close(total[None], expected["scalar"], "the sum", True)
    check_released_gradients(model, total, expected, "grad")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", cases("model"))
def test_released_loss(folder, backend):
    """The mean over the tasks of the means over their rows."""
    _, inputs, expected, model, arguments, options = made(folder, backend)
    output = model(*arguments, **options, labels=inputs["labels"])
    close(output.loss[None], expected["loss"], "loss")
    for task in arguments[1].unique().tolist():
        close(output.task_losses[task : task + 1], expected[f"task_loss.{task}"], f"loss of task {task}")
    check_released_gradients(model, output.loss, expected, "grad_loss")


@pytest.mark.parametrize("folder", cases("model"))
def test_freezing(folder):
    config, _, _, model, *_ = made(folder, "eager")
    model.freeze(*map(int, config["freeze_encoder_layers"].split("-")))
    names = ca_mtl.official_names(model.config)
    frozen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen |= {names[name]} if isinstance(names[name], str) else set(names[name])
    assert frozen == set(config["frozen_parameter_names"])


# Of 8 GLUE tasks: those of the released code, which were counted there.
COUNTS = {
    "ca-mtl-base": (128_063_264, 69_789_508, (0, 4)),
    "ca-mtl-large": (480_334_600, 298_566_024, (0, 11)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_parameters(name):
    model = models.load(name, device="meta")
    total, trained, layers = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == total
    model.freeze(*layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    of = {"matrix": 33_792, "film": 15_355_392} if name.endswith("base") else {"matrix": 49_152, "film": 50_380_800}
    norms = [m for m in model.modules() if isinstance(m, ConditionalLayerNorm)]
    assert sum(p.numel() for m in norms for p in m.film.parameters()) == of["film"]
    assert sum(layer.attention.matrix.numel() for layer in model.layers) == of["matrix"]


# --- Behaviour ---------------------------------------------------------------------------------------------------------------

SMALL = dict(
    tasks=("a", "b", "c"),
    num_labels=(2, 3, 1),
    max_seq_length=8,
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
)


def small(variant="base", **changes):
    torch.manual_seed(0)
    model = ca_mtl.CAMTL(ca_mtl.CAMTLConfig(variant=variant, **SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def batch(rows=6, length=8):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (rows, length), generator=g)
    mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=g)
    return {
        "input_ids": ids * mask,
        "task_id": torch.tensor([2, 0, 1, 0, 2, 2])[:rows],
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(2, (rows, length), generator=g),
    }


@pytest.mark.parametrize("variant", ["base", "large"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_other_tasks_change_nothing(variant, backend):
    model, data = set_backend(small(variant), backend), batch()
    together = model(**data).logits
    for i in range(6):
        alone = model(**{n: t[i : i + 1] for n, t in data.items()}).logits
        torch.testing.assert_close(alone[0], together[i], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["base", "large"])
def test_training_backends_agree(variant):
    """With dropout off in the probabilities and everywhere: losses and gradients of the fused and the plain way."""
    data, labels = batch(), torch.tensor([2.5, 1.0, 2.0, 0.0, 4.0, 0.0])
    found = {}
    for backend in BACKENDS:
        model = set_backend(small(variant, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), backend)
        loss = model(**data, labels=labels).loss
        loss.backward()
        found[backend] = [loss.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]
    for backend in BACKENDS[1:]:
        for a, b in zip(found[backend], found[BACKENDS[0]], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dropout_is_drawn_and_trains():
    model, data = small().train(), batch()
    losses = [model(**data, labels=torch.zeros(6)).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (model.word.weight.grad[0] == 0).all()  # of the padding


def test_absent_arguments():
    model, data = small(), batch()
    ones = torch.ones_like(data["input_ids"])
    plain = model(data["input_ids"], data["task_id"])
    said = model(data["input_ids"], data["task_id"], attention_mask=ones, token_type_ids=torch.zeros_like(ones))
    torch.testing.assert_close(plain.logits, said.logits)
    assert plain.loss is None and plain.task_losses is None


def test_logits_of_other_tasks_are_out_of_reach():
    logits = small()(**batch()).logits
    assert logits.shape == (6, 3)
    assert (logits[[1, 3], 2] == float("-inf")).all() and (logits[[0, 4, 5], 1:] == float("-inf")).all()
    assert logits[2].isfinite().all()


def test_bfloat16():
    model, data = small().bfloat16(), batch()
    exact = small()(**data).pooled
    assert (model(**data).pooled.float() - exact).abs().max() < 0.15


def test_compiled_in_one_graph():
    model, data = small(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**data).logits, model(**data).logits)


def test_files(tmp_path):
    model, data = small("large"), batch()
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(**data).logits, model(**data).logits)


def test_every_config_can_be_made():
    for name in ca_mtl.CONFIGS:
        assert models.load(name, device="meta").config.variant in ca_mtl.VARIANTS


def bert(hidden=32, layers=2):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=16)).eval()


@pytest.mark.parametrize("variant", ["base", "large"])
def test_begins_with_a_bert(variant):
    """Where tasks modulate nothing yet, the lower layers compute what the BERT's do."""
    peer, data = bert(layers=4), batch()
    config = peer.config.to_dict() | {"layer_norm_eps": 1e-12}
    tasks = {n: SMALL[n] for n in ("tasks", "num_labels", "max_seq_length")}
    model = ca_mtl.from_bert(config, peer.state_dict(), variant=variant, **tasks).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FiLM):
                module.linear.weight.zero_()
    states = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out[1]))
    with torch.no_grad():
        model(**data)
        expected = peer(
            data["input_ids"], attention_mask=data["attention_mask"], token_type_ids=data["token_type_ids"],
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    known = 3 if variant == "base" else 4
    for state, right in zip(states[:known], expected[1:], strict=False):
        torch.testing.assert_close(state, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(variant="huge"), "variant is 'huge'; allowed are 'base', 'large'"),
        (dict(num_labels=(2, 3)), "num_labels has 2 entries"),
        (dict(num_labels=(2, 3, 0)), r"num_labels\[2\] is 0"),
        (dict(tasks=("a", "a", "b")), "it must have a different name"),
        (dict(max_seq_length=7), "max_seq_length is 7; it must divide hidden_size, 32"),
        (dict(max_seq_length=32), "it must be at most max_position_embeddings, 16"),
        (dict(num_hidden_layers=3), "variant 'base' needs an even number"),
        (dict(num_attention_heads=5), "num_attention_heads is 5; it must divide"),
        (dict(hidden_dropout_prob=1.0), "hidden_dropout_prob is 1.0"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ca_mtl.CAMTLConfig(**SMALL | change)
    assert ca_mtl.CAMTLConfig(**SMALL | dict(variant="large", num_hidden_layers=3)).plain_layers == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            dict(input_ids=torch.ones(6, 5, dtype=torch.int64)),
            ValueError,
            r"input_ids has shape \(6, 5\); it must be .*\(B, 8\)",
        ),
        (
            dict(task_id=torch.tensor([0, 1, 2, 3, 0, 0])),
            IndexError,
            r"task_id has numbers from 0 to 3; they must be in \[0, 3\)",
        ),
        (dict(task_id=torch.zeros(5, dtype=torch.int64)), ValueError, r"task_id has shape \(5,\)"),
        (dict(attention_mask=torch.ones(6, 5)), ValueError, r"attention_mask has shape \(6, 5\)"),
        (dict(labels=torch.ones(5)), ValueError, r"labels has shape \(5,\); it must be \(6,\)"),
    ],
)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        small()(**batch() | change)


@pytest.mark.parametrize("folder", cases("model_base_tiny"))
def test_bad_checkpoints(folder):
    config, _, _, weights = read(folder)
    name = "bert.encoder.layer.1.intermediate.dense.bias"
    with pytest.raises(ValueError, match=f"state_dict has no '{name}'"):
        ca_mtl.from_official(config, {n: t for n, t in weights.items() if n != name})
    with pytest.raises(ValueError, match="state_dict has 'bert.more', which this CA-MTL does not have"):
        ca_mtl.from_official(config, weights | {"bert.more": torch.zeros(1)})
    with pytest.raises(models.InputError, match="layers.0.fc1.bias has shape"):
        ca_mtl.from_official(config, weights | {"bert.encoder.layer.0.intermediate.dense.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        ca_mtl.from_official(config | {"hidden_act": "relu"}, weights)
    with pytest.raises(TypeError, match="state_dict is a list"):
        ca_mtl.from_official(config, [])
    model = ca_mtl.from_official(config, weights)
    assert dataclasses.asdict(model.config)["num_labels"] == tuple(config["num_labels"].values())
    with pytest.raises(ValueError, match="the layers from 2 to 9 are to be frozen; the model has 0 to 3"):
        model.freeze(2, 9)
