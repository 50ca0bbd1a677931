"""AdapterHub: golden tensors of the library, published sizes, compositions row by row, folders, errors, MAD-X."""

import concurrent.futures
import copy
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mmkernels import _library, ops, testing
from mmkernels.models import InputError, adapterhub
from mmkernels.models.adapterhub import PRESETS, AdapterHub
from mmkernels.modules import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack, set_backend
from mmkernels.train import masked_lm
from mmkernels.train.loop import Settings

transformers.logging.set_verbosity_error()
BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
ROOTS = [Path(__file__).parents[1] / "golden"]
if os.environ.get("MMKERNELS_GOLDEN"):
    ROOTS.append(Path(os.environ["MMKERNELS_GOLDEN"]))
FOLDERS = {f.parent.name: f.parent for root in ROOTS for f in root.glob("adapterhub/*/config.json")}
BERT = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
    attn_implementation="eager",
)


def bert(kind=transformers.BertModel, **options):
    torch.manual_seed(0)
    return randomize(kind(transformers.BertConfig(**BERT, **options))).eval()


def randomize(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(1 + noise if "LayerNorm.weight" in name else noise)
    return model


def tokens(rows=6, length=5):
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(4))


def hub_of(preset="seq_bn", names="abc", sizes=(4, 2, 8), model=None, **options):
    hub = AdapterHub(bert() if model is None else model, **options)
    for name, factor in zip(names, sizes, strict=False):
        hub.add_adapter(name, preset, reduction_factor=factor)
    randomize(hub.model)
    return hub


def run(hub, setup, ids=None, **extra):
    hub.set_active(setup)
    with torch.no_grad():
        return hub.model.eval()(input_ids=tokens() if ids is None else ids, **extra)[0]


def assert_close(actual, expected, what="output", atol=1e-5, rtol=1e-4):
    """The tolerances that the golden tensors were stored with."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


# --- Golden tensors of the library -------------------------------------------------------------------------------------------


def golden(case, backend):
    """(hub of the folders that the library wrote, inputs, outputs)."""
    folder = FOLDERS[case]
    config = json.loads((folder / "config.json").read_text())
    model = transformers.BertModel(transformers.BertConfig(**config["base"], attn_implementation="eager"))
    weights = {n.removeprefix("bert."): t for n, t in load_file(folder / "weights.safetensors").items()}
    model.load_state_dict({n: t for n, t in weights.items() if n in model.state_dict()})
    hub = AdapterHub(model.eval(), compat="adapters", backend=backend)
    for part in sorted(folder.iterdir()):
        if part.name.startswith("adapter_") and not part.name.endswith("safetensors"):
            hub.load_adapter(part)
    for part in sorted(folder.iterdir()):
        if part.name.startswith("fusion_") and not part.name.endswith("safetensors"):
            hub.load_adapter_fusion(part)
    own = hub.model.state_dict()
    assert set(weights) - set(own) <= {"prompt_tuning.base_model_embeddings.weight"}
    for name, tensor in own.items():
        assert torch.equal(tensor, weights[name]), name
    hub.model.eval()
    return hub, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def check_golden(hub, inputs, outputs, name, **extra):
    model, mask = hub.model, inputs["attention_mask"]
    model.zero_grad()
    out = model(input_ids=inputs["input_ids"], attention_mask=mask, **extra)[0]
    assert_close(out, outputs[f"{name}.output"], name)
    if f"{name}.cotangent" not in inputs:
        return
    (out * inputs[f"{name}.cotangent"]).sum().backward()
    for parameter, tensor in model.named_parameters():
        expected = outputs.get(f"{name}.grad.{parameter}")
        if expected is None:  # stored where they are not zero
            assert tensor.grad is None or float(tensor.grad.abs().max()) <= 5e-5, parameter
        else:
            assert_close(tensor.grad, expected, f"gradient of {parameter} in {name}", 5e-5, 1e-3)


SETUPS = {
    "stack": Stack("a", "b"),
    "batch_split": BatchSplit("a", "b", "c", batch_sizes=[1, 3, 2]),
    "parallel": Parallel("a", "b", "c"),
    "split": Split("a", "b", splits=[2, 3]),
    "average": Average("a", "b", "c", weights=[1, 2, 3]),
    "average_unnormalized": Average("a", "b", "c", weights=[1, 1, 1], normalize_weights=False),
    "multi_task": MultiTask("a", "b", "c"),
    "parallel_of_stacks": Parallel(Stack("a", "b"), "c"),
    "batch_split_of_stacks": BatchSplit(Stack("a", "b"), "c", batch_sizes=[4, 2]),
}
TASKS = [2, 0, 1, 0, 2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["compositions_double", "compositions_pfeiffer"])
def test_golden_compositions(case, backend):
    hub, inputs, outputs = golden(case, backend)
    for name, setup in SETUPS.items():
        hub.set_active(setup)
        extra = {"task_ids": torch.tensor(TASKS)} if name == "multi_task" else {}
        check_golden(hub, inputs, outputs, name, **extra)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_houlsby(backend):
    hub, inputs, outputs = golden("houlsby", backend)
    for name, setup in {"plain": "plain", "mnli": "mnli", "stack_mnli_plain": Stack("mnli", "plain")}.items():
        hub.set_active(setup)
        check_golden(hub, inputs, outputs, name)
    hub.set_active("plain", skip_layers=[0])
    check_golden(hub, inputs, outputs, "plain_skip_layer0")
    again = AdapterHub(transformers.BertModel(hub.model.config))
    again.load_adapter(FOLDERS["houlsby"] / "adapter_plain_safetensors")
    for ours, theirs in zip(again.parameters_of("plain"), hub.parameters_of("plain"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_fusion(backend):
    hub, inputs, outputs = golden("fusion", backend)
    hub.train_adapter_fusion(Fuse("sst", "mnli", "rte"))
    loss = hub.fusion_regularization()
    assert float(loss.detach()) == pytest.approx(float(outputs["regularization_loss"]), rel=1e-4)
    loss.backward()
    for name, parameter in hub.model.named_parameters():
        if f"regularization_loss.grad.{name}" in outputs:
            assert_close(parameter.grad, outputs[f"regularization_loss.grad.{name}"], name)
    config = json.loads((FOLDERS["fusion"] / "config.json").read_text())
    trainable = [name for name, parameter in hub.model.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(config["trainable_after_train_adapter_fusion"])
    hub.model.requires_grad_(True).eval()
    for layer in hub.model.encoder.layer:
        layer.output.adapter_fusion_layer["sst,mnli,rte"].keep_attention = True
    check_golden(hub, inputs, outputs, "dynamic")
    for number, layer in enumerate(hub.model.encoder.layer):
        attention = layer.output.adapter_fusion_layer["sst,mnli,rte"].attention
        assert_close(attention, outputs[f"dynamic.fusion_attention.layer{number}.output_adapter"])
    pair = Fuse("sst", "mnli", name="pair")
    for name, setup in {"static": pair, "stack_static": Stack("rte", pair)}.items():
        hub.set_active(setup)
        check_golden(hub, inputs, outputs, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_pfeiffer_with_its_head(backend):
    folder = FOLDERS["pfeiffer"]
    hub, inputs, outputs = golden("pfeiffer", backend)
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert_close(hub.model(**batch)[0], outputs["last_hidden_state_no_adapter"])
    hub.train_adapter("sst")
    config = json.loads((folder / "config.json").read_text())
    trainable = [name for name, parameter in hub.model.named_parameters() if parameter.requires_grad]
    expected = [name.removeprefix("bert.") for name in config["trainable_after_train_adapter"]]
    assert sorted(trainable) == sorted(expected)
    hub.model.requires_grad_(True).eval()
    assert_close(hub.model(**batch)[0], outputs["last_hidden_state"])
    logits = hub(**batch)["logits"]
    assert_close(logits, outputs["output"])
    (logits * inputs["cotangent"]).sum().backward()
    for name, parameter in hub.model.named_parameters():
        stored = name if name.startswith("heads.") else f"bert.{name}"
        if f"grad.{stored}" in outputs:
            assert_close(parameter.grad, outputs[f"grad.{stored}"], f"gradient of {name}", 5e-5, 1e-3)


# --- Sizes -------------------------------------------------------------------------------------------------------------------

SIZES = {  # config, changes -> parameters in BERT base and large, as published or counted in the library
    ("seq_bn", None): (894_528, 3_171_840),
    ("seq_bn", 64): (230_544, 811_392),
    ("seq_bn", 2): (7_091_712, 25_202_688),
    ("double_seq_bn", None): (1_789_056, 6_343_680),
    ("par_bn", None): (7_091_712, 25_202_688),
    ("scaled_par_bn", None): (7_091_724, 25_202_712),
    ("seq_bn_inv", None): (1_190_592, 3_697_664),
    ("seq_bn_inv", 2): (7_387_776, 25_728_512),
    ("compacter", None): (57_088, 152_128),
    ("compacter++", None): (28_576, 76_096),
    ("AdapterPlus", None): (165_984, 540_912),
}
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def test_published_sizes():
    """Of all presets, in BERT base and large, without memory for them."""
    for column, (config, total, fusion) in enumerate((({}, 109_482_240, 21_252_096), (LARGE, 335_141_888, 75_546_624))):
        with torch.device("meta"):
            hub = AdapterHub(transformers.BertModel(transformers.BertConfig(**config)))
        assert hub.model.num_parameters() == total
        for number, ((preset, factor), sizes) in enumerate(SIZES.items()):
            changes = {} if factor is None else {"reduction_factor": factor}
            hub.add_adapter(f"n{number}", preset, **changes)
            assert hub.num_parameters(f"n{number}") == sizes[column], preset
        hub.add_adapter_fusion(["n0", "n1", "n2"])
        assert sum(tensor.numel() for tensor in hub._fusion_tensors("n0,n1,n2").values()) == fusion
    assert {preset for preset, _ in SIZES} | {"double_seq_bn_inv"} <= set(PRESETS)


# --- Compositions, our way: every row as if its own adapters were alone ------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "AdapterPlus", "compacter"])
def test_rows_are_those_of_their_adapters(preset, backend):
    hub = hub_of(preset, sizes=(4, 2, 4) if preset != "compacter" else (4, 4, 4), backend=backend)
    ids = tokens()
    alone = {path: run(hub, Stack(*path)) for path in ("a", "b", "c", "ab", "bc")}
    out = run(hub, BatchSplit("a", "b", "c", batch_sizes=[1, 3, 2]))
    assert_close(out, torch.cat([alone["a"][:1], alone["b"][1:4], alone["c"][4:]]), "BatchSplit")
    assert_close(run(hub, Parallel("a", "b", "c")), torch.cat([alone[n] for n in "abc"]), "Parallel")
    for tasks in (torch.tensor(TASKS), ["abc"[task] for task in TASKS]):
        out = run(hub, MultiTask("a", "b", "c"), task_ids=tasks)
        assert_close(out, torch.stack([alone["abc"[t]][row] for row, t in enumerate(TASKS)]), "MultiTask")
    out = run(hub, Parallel(Stack("a", "b"), "c"))
    assert_close(out, torch.cat([alone["ab"], alone["c"]]), "Parallel of a Stack")
    out = run(hub, BatchSplit("a", Stack("b", "c"), batch_sizes=[4, 2]))
    assert_close(out, torch.cat([alone["a"][:4], alone["bc"][4:]]), "BatchSplit of a Stack")
    assert_close(run(hub, Stack("a", Parallel("b", "b"))), alone["ab"].repeat(2, 1, 1), "Parallel in a Stack")
    assert_close(run(hub, Average("a", "a", "a")), alone["a"], "Average of one")
    assert_close(run(hub, Average("b", "a", weights=[0, 1])), alone["a"], "Average with a weight of 0")
    assert_close(run(hub, Split("a", "a", splits=[2, 3])), alone["a"], "Split")
    nested = BatchSplit(BatchSplit("a", "b", batch_sizes=1), "c", batch_sizes=[2, 4])
    assert_close(run(hub, nested, ids), torch.cat([alone["a"][:1], alone["b"][1:2], alone["c"][2:]]), "BatchSplit in one")


def test_different_adapters_in_one_batch():
    """Other configs, and adapters that have no place in a layer: rows are computed apart."""
    hub = AdapterHub(bert())
    hub.add_adapter("a", "seq_bn", reduction_factor=4, leave_out=[0])
    hub.add_adapter("b", "double_seq_bn", reduction_factor=4)
    hub.add_adapter("c", "par_bn", use_gating=True, ln_before=True)
    randomize(hub.model)
    alone = {name: run(hub, name) for name in "abc"}
    expected = torch.cat([alone["a"][:2], alone["b"][2:3], alone["c"][3:]])
    assert_close(run(hub, BatchSplit("a", "b", "c", batch_sizes=[2, 1, 3])), expected)
    assert_close(run(hub, MultiTask("c", "b", "a"), task_ids=["a", "a", "b", "c", "c", "c"]), expected)
    assert_close(run(hub, Parallel("a", "b", "c")), torch.cat([alone[n] for n in "abc"]))


def test_threads_have_passes_of_their_own():
    hub = hub_of(names="ab")
    hub.set_active(MultiTask("a", "b"))
    hub.model.eval()
    ids = tokens()
    expected = [run(hub, name, ids) for name in "ab"]
    hub.set_active(MultiTask("a", "b"))
    wrong, barrier = [], threading.Barrier(2)

    def serve(task):
        with torch.no_grad():
            for _ in range(20):
                barrier.wait()
                out = hub.model(input_ids=ids, task_ids=[task] * len(ids))[0]
                wrong.append(float((out - expected[task]).abs().max()))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(serve, task) for task in (0, 1)]:
            future.result()
    assert len(wrong) == 40 and max(wrong) < 1e-5
    assert not hub.active.passes


def test_adapters_with_and_without_biases_in_one_batch():
    hub = AdapterHub(bert())
    hub.add_adapter("a", "compacter++", phm_bias=False, non_linearity="relu", reduction_factor=2, phm_dim=2)
    hub.add_adapter("b", "seq_bn", reduction_factor=4)
    randomize(hub.model)
    ids = tokens()
    for names in ("ab", "ba"):
        out = run(hub, BatchSplit(*names, batch_sizes=3), ids)
        assert_close(out, torch.cat([run(hub, name, part) for name, part in zip(names, ids.split(3), strict=True)]))


def test_heads_of_rows_without_any():
    hub = hub_of(names="ab")
    for name in "ab":
        hub.add_head(name, num_labels=3)
    hub.set_active(BatchSplit("a", "b", batch_sizes=[0, 6]))
    labels = {"a": torch.zeros(0, dtype=torch.int64), "b": torch.tensor([0, 1, 2, 0, 1, 2])}
    result = hub(input_ids=tokens(), labels=labels)
    assert_close(result["loss"], torch.nn.functional.cross_entropy(result["logits"]["b"], labels["b"]))
    with pytest.raises(TypeError, match="labels is a Tensor; it must be a dict of labels by the heads a, b"):
        hub(input_ids=tokens(), labels=labels["b"])


def test_tasks_belong_to_one_forward_pass():
    hub = hub_of(model=bert(transformers.BertForMaskedLM))
    run(hub, MultiTask("a", "b", "c"), task_ids=TASKS)
    base = hub.model.bert
    for part in (hub.model, base):
        with pytest.raises(ValueError, match="task_ids is None"):
            part(input_ids=tokens())
    expected = base(input_ids=tokens(), task_ids=TASKS)[0]
    with pytest.raises(ValueError, match="task_ids is None"):
        base.encoder(expected)
    run(hub, Parallel("a", "b"))
    hub.set_active("a")
    alone = base(input_ids=tokens(3))[0]
    hub.set_active(Parallel("a", "b"))
    assert_close(base(input_ids=tokens(3))[0][:3], alone)  # another number of rows than before


def test_multi_task_in_training_reaches_each_adapter_by_its_own_rows():
    hub = hub_of()
    hub.train_adapter(MultiTask("a", "b", "c"))
    hub.model.eval()  # no dropout
    tasks = torch.tensor([0, 2, 2, 0, 2, 0])  # nobody has the second one
    hub.model(input_ids=tokens(), task_ids=tasks)[0].square().sum().backward()
    for name in "abc":
        used = any(bool(p.grad is not None and p.grad.any()) for p in hub.parameters_of(name))
        assert used == (name != "b")
    gradients = [p.grad.clone() for p in hub.parameters_of("a")]
    hub.model.zero_grad()
    hub.set_active("a")
    hub.model(input_ids=tokens()[tasks == 0])[0].square().sum().backward()
    for together, alone in zip(gradients, hub.parameters_of("a"), strict=True):
        assert_close(together, alone.grad, atol=1e-4)


def test_parallel_is_repeated_from_its_first_layer_on():
    hub = hub_of()
    rows = []
    for layer in hub.model.encoder.layer:
        layer.attention.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    run(hub, Parallel("a", "b"))
    assert rows == [6, 12]
    hub.set_active(Parallel("a", "b"), skip_layers=[0, 1])
    assert hub.model(input_ids=tokens())[0].shape[0] == 6


@pytest.mark.parametrize("kind", ["nice", "glow"])
def test_invertible_adapters_of_each_path(kind):
    hub = AdapterHub(bert(transformers.BertForMaskedLM))
    for name in ("en", "qu"):
        hub.add_adapter(name, "seq_bn_inv", inv_adapter=kind)
    hub.add_adapter("ner", "seq_bn")
    randomize(hub.model)
    alone = {name: run(hub, name) for name in ("en", "qu", "ner")}
    assert_close(run(hub, Parallel("ner", "en")), torch.cat([alone["ner"], alone["en"]]))
    assert_close(run(hub, BatchSplit("en", "qu", batch_sizes=3)), torch.cat([alone["en"][:3], alone["qu"][3:]]))
    out = run(hub, MultiTask("en", "qu"), task_ids=[1, 0, 0, 0, 0, 0])
    assert_close(out, torch.cat([alone["qu"][:1], alone["en"][1:]]))
    hub.add_adapter_fusion(["en", "qu"])
    with pytest.raises(ValueError, match="different invertible adapters"):
        run(hub, Fuse("en", "qu"))


# --- The model stays a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_what_is_around_adapters_is_fast_where_they_are_active(backend, monkeypatch):
    calls = []
    for name in ("bias_gelu", "linear"):
        own = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *args, own=own, name=name, **options: calls.append(name) or own(*args, **options)
        )
    for name in ("SLOW_MKL", "AVX512"):
        monkeypatch.setattr(_library, name, True)
    plain = bert()
    hub = hub_of(model=copy.deepcopy(plain), backend=backend)
    plain.load_state_dict({name: hub.model.state_dict()[name] for name in plain.state_dict()})
    ids = tokens(8, 20)
    hub.set_active(None)
    assert torch.equal(hub.model(input_ids=ids)[0], plain(input_ids=ids)[0]) and not calls
    hub.set_active("a")
    out = hub.model(input_ids=ids)[0]
    gelu = ["bias_gelu"] if _library.load("cpu").loaded else []
    layer = ["linear"] * 5 + gelu + ["linear"]
    assert calls == (layer * 2 if backend == "auto" else [])  # the pooler has too few rows
    assert torch.equal(pickle.loads(pickle.dumps(hub.model))(input_ids=ids)[0], out)
    set_backend(hub.model, "eager")
    eager, exact = hub.model(input_ids=ids)[0], hub.model.double()(input_ids=ids)[0]
    testing.assert_within_budget(out, exact, eager, "output")


def test_without_adapters_it_is_the_plain_model():
    plain = bert()
    hub = AdapterHub(copy.deepcopy(plain))
    hub.add_adapter("a")
    assert torch.equal(hub.model(input_ids=tokens())[0], plain(input_ids=tokens())[0])
    hub.set_active("a")
    hub.set_active(None)
    assert torch.equal(hub.model(input_ids=tokens())[0], plain(input_ids=tokens())[0])
    hub.delete_adapter("a")
    assert list(hub.model.state_dict()) == list(plain.state_dict())
    assert isinstance(hub.model.encoder.layer[0].output, type(plain.encoder.layer[0].output))


@pytest.mark.parametrize("kind", ["roberta", "vit", "t5"])
def test_places_of_other_layouts(kind):
    """An adapter that adds a constant to what a sub-layer gives is as good as another bias there."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    make = {
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**{**BERT, "pad_token_id": 0})),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)),
        "t5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
    }[kind]
    plain = randomize(make()).eval()
    hub = AdapterHub(copy.deepcopy(plain))
    hub.add_adapter("a", "double_seq_bn", reduction_factor=4)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if kind == "vit" else {"input_ids": tokens()}
    assert len(hub.places) == 4
    with torch.no_grad():
        for number, (_, place) in enumerate(hub.places.values()):
            adapter = place.owner.adapters["a"]
            adapter.adapter_up.weight.zero_()
            adapter.adapter_up.bias.fill_(0.3 + number)
        hub.set_active("a")
        out = hub.model.eval()(**inputs)[0]
        if kind == "t5":  # it has no biases: constants go in through hooks on what is in front of the residual
            inner = [m for m in plain.modules() if type(m).__name__ in ("T5Attention", "T5DenseActDense")]
        else:
            names = ("output.dense", "attention.o_proj", "mlp.fc2")
            inner = [m for n, m in plain.named_modules() if n.endswith(names)]
        assert len(inner) == 4
        for number, module in enumerate(inner):
            module.register_forward_hook(_Add(0.3 + number))
        assert_close(out, plain(**inputs)[0])


@pytest.mark.parametrize("kind", ["Marian", "Pegasus", "GPTNeo", "SiglipVision", "DeiT"])
def test_models_of_the_same_layouts(kind):
    """Norms behind or in front, found by the parts of a model: it computes what it did until an adapter is active."""
    image = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4)
    text = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    text |= dict(encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, decoder_start_token_id=1)
    text |= dict(max_position_embeddings=24, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2)
    neo = dict(vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
    sizes = {"Marian": text, "Pegasus": text, "GPTNeo": neo}.get(kind, image)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    plain = randomize(getattr(transformers, f"{kind}Model")(config)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if sizes is image else {"input_ids": tokens()}
    inputs |= {"decoder_input_ids": tokens()} if sizes is text else {}
    hub = AdapterHub(copy.deepcopy(plain))
    hub.add_adapter("a", "double_seq_bn", cross_adapter=True)
    expected = plain(**inputs).last_hidden_state
    assert torch.equal(hub.model.eval()(**inputs).last_hidden_state, expected)
    hub.set_active("a")
    assert not torch.equal(hub.model(**inputs).last_hidden_state, expected)
    assert len(hub.places) == (10 if sizes is text else 4)


class _Add:
    def __init__(self, number):
        self.number = number

    def __call__(self, module, args, output):
        return (output[0] + self.number, *output[1:]) if isinstance(output, tuple) else output + self.number


def test_copies_are_independent_and_pickles_compute_the_same():
    hub = hub_of()
    expected = run(hub, "a")
    other = copy.deepcopy(hub)
    loaded = pickle.loads(pickle.dumps(hub.model))
    hub.set_active("b")
    for model in (other.model, loaded):
        assert torch.equal(model(input_ids=tokens())[0], expected)


def test_a_text_to_text_head_trains():
    """In a T5 without a head, by labels alone; a T5 with a head of its own has no place for another one."""
    sizes = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    hub = AdapterHub(transformers.T5Model(transformers.T5Config(**sizes, dropout_rate=0.0)))
    hub.add_adapter("a", "seq_bn", reduction_factor=2)
    head = hub.add_head("a", "seq2seq_lm")
    assert torch.equal(head[-1].weight, hub.model.get_input_embeddings().weight)  # tied models begin with their own
    hub.train_adapter("a")
    optimizer = torch.optim.AdamW([p for p in hub.model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = hub(input_ids=tokens(), labels=tokens())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    whole = AdapterHub(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    with pytest.raises(InputError, match="T5ForConditionalGeneration, which has a head"):
        whole.add_head("a")


def test_checkpointed_activations():
    hub = hub_of()
    results = []
    for recompute in (False, True):
        hub.train_adapter(Parallel("a", "b"))
        hub.model.eval()
        if recompute:
            hub.model.gradient_checkpointing_enable({"use_reentrant": False})
            hub.model.train()
        hub.model.zero_grad()
        for module in hub.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        hub.model(input_ids=tokens())[0].square().sum().backward()
        results.append([p.grad.clone() for p in hub.parameters_of("a")])
    for plain, again in zip(*results, strict=True):
        assert_close(again, plain)


def test_a_mixed_batch_compiles_in_one_graph():
    hub = hub_of()
    expected = run(hub, MultiTask("a", "b", "c"), task_ids=torch.tensor(TASKS))
    compiled = torch.compile(hub.model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(input_ids=tokens(), task_ids=torch.tensor(TASKS))[0], expected)


@pytest.mark.parametrize("setup", [Stack("a"), BatchSplit("a", "b", "c", batch_sizes=2)], ids=str)
def test_bfloat16(setup):
    hub = hub_of("double_seq_bn")
    exact = run(hub, setup)

    def error(backend):
        set_backend(hub.model, backend)
        return float((run(hub, setup).double() - exact).norm())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(hub, setup).dtype == run(hub, None).dtype == torch.float32
        assert error("auto") <= 2 * error("eager")
    hub.model.bfloat16()
    assert error("auto") <= 2 * error("eager")


def test_dropout_gate_and_depth_in_training():
    hub = AdapterHub(bert())
    hub.add_adapter("a", "double_seq_bn", dropout=0.5, use_gating=True, stochastic_depth=0.5)
    randomize(hub.model)
    hub.train_adapter("a")
    torch.manual_seed(0)
    first, second = (hub.model(input_ids=tokens())[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hub.parameters_of("a"))


# --- Wrong input -------------------------------------------------------------------------------------------------------------


def test_wrong_names_and_setups():
    hub = hub_of()
    hub.add_adapter_fusion(["a", "b"])
    cases = [
        (lambda: hub.set_active("d"), "adapter 'd' is unknown; known are 'a', 'b', 'c'"),
        (lambda: hub.set_active(Fuse("a", "c")), "fusion 'a,c' is unknown; known are 'a,b'"),
        (lambda: hub.add_adapter("a"), "name is 'a', which is taken"),
        (lambda: hub.add_adapter("training"), "name is 'training'; it must be a word without dots"),
        (lambda: hub.add_head("keys"), "name is 'keys'; it must be a word without dots"),
        (lambda: hub.add_adapter("d.e"), "without dots"),
        (lambda: hub.add_adapter("d", "pfeifer"), "config is 'pfeifer'; allowed are 'seq_bn'"),
        (lambda: hub.add_adapter("d", width=3), "unknown option 'width'"),
        (lambda: hub.add_adapter("d", leave_out=["first"]), "leave_out is ['first']; it must have numbers of layers"),
        (lambda: hub.add_adapter("d", leave_out=5), "leave_out is 5; it must have numbers of layers"),
        (lambda: hub.add_adapter("d", "compacter", phm_dim=0), "phm_dim is 0; it must be a number, an integer of at least 1"),
        (lambda: hub.add_adapter("d", scaling=None), "scaling is None; it must be a number"),
        (lambda: hub.add_adapter("d", dropout="a"), "dropout is 'a'; it must be a number"),
        (lambda: hub.add_adapter("d", "seq_bn_inv", inv_adapter_reduction_factor="z"), "inv_adapter_reduction_factor is 'z'"),
        (lambda: hub.add_adapter("d", non_linearity="sine"), "non_linearity is 'sine'; allowed are"),
        (lambda: hub.add_adapter("d", reduction_factor={"0": 4}), "it has neither layer 1 nor 'default'"),
        (lambda: hub.add_adapter("d", "compacter"), "phm_dim 4 must divide it"),
        (lambda: hub.delete_adapter("a"), "in the fusion 'a,b'"),
        (lambda: hub.delete_adapter("e"), "adapter 'e' is unknown"),
        (lambda: hub.train_adapter_fusion("a"), "it must have a Fuse"),
        (lambda: hub.train_adapter_fusion(None), "setup is None; it must be the name of an adapter"),
        (lambda: hub.train_adapter(None), "setup is None; it must be the name of an adapter"),
        (lambda: hub.add_adapter_fusion([]), "names is empty"),
        (lambda: hub.add_adapter_fusion("ab"), "adapter 'ab' is unknown"),
        (lambda: hub.add_adapter_fusion("a,b", name="keys"), "name is 'keys'; it must be a word"),
        (lambda: Average("a", "b", weights=[1, float("nan")]), "they must be finite"),
        (lambda: hub.add_head("h", "classify"), "head_type is 'classify'; allowed are"),
        (lambda: hub.add_head("h", labels=3), "has no option 'labels'"),
        (lambda: hub(input_ids=tokens(), head="h"), "head 'h' is unknown"),
        (lambda: AdapterHub(hub.model), "has adapters already"),
        (lambda: AdapterHub(torch.nn.Linear(2, 2)), "must be a model of transformers"),
        (lambda: AdapterHub(bert(), compat="peft"), "compat is 'peft'"),
        (lambda: run(hub, MultiTask("a", "b")), "task_ids is None"),
        (lambda: run(hub, MultiTask("a", "b"), task_ids=["a"] * 5 + ["d"]), "task_ids has 'd'"),
        (lambda: run(hub, MultiTask("a", "b"), task_ids=[True] * 6), "task_ids has True"),
        (lambda: run(hub, MultiTask("a", "b"), task_ids=torch.zeros(4).long()), "task_ids has shape (4,); it must be (6,)"),
        (lambda: run(hub, MultiTask("a", "b"), task_ids=torch.tensor([0, 1])), "task_ids has shape (2,); it must be (6,)"),
        (lambda: Parallel("a", Fuse("a", "b")), "cannot stand in a Parallel; allowed in it are names of adapters and Stack"),
        (lambda: Stack("a", Stack("b")), "cannot stand in a Stack"),
        (lambda: Split("a", Stack("b", Parallel("a", "b")), splits=2), "must be the outermost one"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1]), "2 of them"),
    ]
    for wrong, message in cases:
        before = list(hub.model.state_dict()), dict(hub.configs), dict(hub.fusions)
        with pytest.raises(ValueError) as error:
            wrong()
        assert message in str(error.value), message
        assert (list(hub.model.state_dict()), dict(hub.configs), dict(hub.fusions)) == before
    for numbers in ([0, 1, 2, 0, 0, 0], [0, -1, 0, 0, 0, 0]):
        for setup in (MultiTask("a", "b"), MultiTask("a", Stack("a", "b")), MultiTask("a", "a")):
            with pytest.raises(IndexError, match=r"task_ids has numbers from -?\d to \d; they must be in \[0, 2\)"):
                run(hub, setup, task_ids=torch.tensor(numbers))
    with pytest.raises(IndexError, match="is for 5 rows; the batch has 6"):
        run(hub, BatchSplit("a", "b", batch_sizes=[2, 3]))
    with pytest.raises(IndexError, match="is for 6 tokens; the batch has 5"):
        run(hub, Split("a", "b", splits=3))


def test_models_of_other_layouts_are_refused():
    config = transformers.GPTNeoXConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.GPTNeoXModel(config)
    names = list(model.state_dict())
    with pytest.raises(InputError, match="model is a GPTNeoXModel; known are the layouts of BERT, ALBERT, ViT"):
        AdapterHub(model)
    assert list(model.state_dict()) == names


def test_broken_folders(tmp_path):
    hub = hub_of()
    hub.save_adapter("a", tmp_path / "a")

    def broken(change):
        folder = tmp_path / "broken"
        folder.mkdir(exist_ok=True)
        for file in (tmp_path / "a").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        return folder

    def tensors(function):
        def change(folder):
            state = torch.load(folder / "pytorch_adapter.bin")
            function(state)
            torch.save(state, folder / "pytorch_adapter.bin")

        return change

    def config(**changes):
        def change(folder):
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    first = "encoder.layer.0.output.adapters.a.adapter_down.0.weight"
    cases = [
        (tensors(lambda state: state.pop(first)), f"{first} is missing".replace(".a.", ".new.")),
        (tensors(lambda state: state.update({first: torch.zeros(3, 16)})), "has shape (3, 16), the model has (4, 16)"),
        (tensors(lambda state: state.update({"other": torch.zeros(1)})), "other is unknown"),
        (lambda f: (f / "pytorch_adapter.bin").write_bytes((f / "pytorch_adapter.bin").read_bytes()[:500]), "cannot be read"),
        (lambda f: (f / "pytorch_adapter.bin").unlink(), "neither pytorch_adapter.bin nor adapter.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "has no 'name'"),
        (config(config=None), "has config None"),
        (config(config={"architecture": "lora"}), "holds 'lora'"),
        (config(hidden_size=32), "hidden_size 32; this one has 16"),
        (config(config={"reduction_factor": -1}), "reduction_factor is -1"),
    ]
    for change, message in cases:
        before = list(hub.model.state_dict())
        with pytest.raises(InputError) as error:
            hub.load_adapter(broken(change), load_as="new")
        assert message in str(error.value), message
        assert list(hub.model.state_dict()) == before and "new" not in hub.configs


def test_adapters_that_are_there_stay_as_they_were_when_a_folder_is_broken(tmp_path):
    hub = hub_of(names="ab", sizes=(4, 4))
    hub.add_adapter_fusion(["a", "b"])
    hub.add_head("a", num_labels=2)
    hub.save_adapter("a", tmp_path / "alone")
    hub.save_setup(Fuse("a", "b"), tmp_path / "setup")
    randomize(hub.model, seed=8)
    before = copy.deepcopy(hub.model.state_dict())
    (tmp_path / "alone/pytorch_model_head.bin").write_bytes(b"PK damaged")
    (tmp_path / "setup/a,b/pytorch_model_adapter_fusion.bin").write_bytes(b"PK damaged")
    for load in (hub.load_adapter, hub.load_setup):
        with pytest.raises(InputError):
            load(tmp_path / ("alone" if load == hub.load_adapter else "setup"))
        assert {n for n, t in hub.model.state_dict().items() if not torch.equal(t, before[n])} == set()


def test_a_broken_head_or_setup_leaves_nothing(tmp_path):
    hub = hub_of()
    hub.add_head("a", num_labels=3)
    hub.save_adapter("a", tmp_path / "a")
    hub.add_adapter_fusion(["a", "b"])
    hub.save_setup(Fuse("a", "b"), tmp_path / "setup")
    (tmp_path / "a/pytorch_model_head.bin").write_bytes(b"no tensors")
    (tmp_path / "setup/a,b/adapter_fusion_config.json").write_text("{}")
    fresh = AdapterHub(bert())
    fresh.add_head("first")
    before = list(fresh.model.state_dict())
    for wrong, message in ((fresh.load_adapter, "cannot be read"), (fresh.load_setup, "has no 'name'")):
        with pytest.raises(InputError, match=message):
            wrong(tmp_path / ("a" if wrong == fresh.load_adapter else "setup"))
        assert list(fresh.model.state_dict()) == before and not fresh.configs and fresh.active_head == "first"


def test_loading_fewer_layers_and_old_names(tmp_path):
    hub = hub_of("double_seq_bn")
    hub.save_adapter("a", tmp_path / "a")
    other = AdapterHub(bert())
    other.load_adapter(tmp_path / "a", leave_out=[0])
    assert not any("layer.0" in name for name in other._tensors("a"))
    assert sum(p.numel() for p in other.parameters_of("a")) * 2 == sum(p.numel() for p in hub.parameters_of("a"))
    state = torch.load(tmp_path / "a/pytorch_adapter.bin")
    old = {}
    for name, tensor in state.items():
        place = "attention_text_task_adapters" if "attention" in name else "layer_text_task_adapters"
        old[f"bert.{name}".replace(".adapters.", f".{place}.")] = tensor
    torch.save(old, tmp_path / "a/pytorch_adapter.bin")
    file = tmp_path / "a/adapter_config.json"
    content = json.loads(file.read_text())
    del content["version"]
    content |= {"type": "text_task"}
    content["config"] |= {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2, "non_linearity": "gelu"}
    file.write_text(json.dumps(content))
    other.load_adapter(tmp_path / "a", load_as="old")
    assert other.configs["old"].non_linearity == "gelu_new" and other.configs["old"].inv_adapter is None
    for ours, theirs in zip(hub.parameters_of("a"), other.parameters_of("old"), strict=True):
        assert torch.equal(ours, theirs)


# --- MAD-X -------------------------------------------------------------------------------------------------------------------

LANGUAGES = {"en": "the cat sat on a mat and saw the dog run", "qu": "misiqa qata patapi tiyaspa allquta kallpaqta rikurqan"}


def encoder_of(words, offset):
    numbers = {word: offset + number for number, word in enumerate(dict.fromkeys(words.split()))}
    return lambda line: [numbers[word] for word in line.split()]


def test_madx(tmp_path):
    """Languages by masked text, a task on top of the first language's adapter, and the second language put under it."""
    torch.manual_seed(0)
    model = bert(transformers.BertForMaskedLM)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    hub = AdapterHub(model)
    masking = masked_lm.Masking(mask_id=1, vocab_size=60, special_ids=(0,))
    settings = Settings(None, 8, 1e-2, weight_decay=0.0, warmup_steps=1, steps=80, evaluate_every=80)
    losses = {}
    for number, (language, sentence) in enumerate(LANGUAGES.items()):
        file = tmp_path / f"{language}.txt"
        file.write_text("\n".join([sentence] * 20))
        texts = masked_lm.TextBlocks([file], encoder_of(sentence, 10 + 15 * number), 12, masking, first=2, last=3)
        task = masked_lm.make_task(texts, texts)
        hub.add_adapter(language, "seq_bn_inv", reduction_factor=2)
        hub.train_adapter(language)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        before = masked_lm.accuracy(model.eval(), [_all(texts)])["held_out_loss"]
        history = masked_lm.train(model, task, settings, tmp_path / language)
        losses[language] = before, history[-1]["held_out_loss"]
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        hub.save_adapter(language, tmp_path / f"{language}-adapter", with_head=False)
    assert all(after < 0.75 * before for before, after in losses.values()), losses

    encoder = AdapterHub(_encoder_of(model))
    for language in LANGUAGES:
        encoder.load_adapter(tmp_path / f"{language}-adapter")
    encoder.add_adapter("task", "seq_bn", reduction_factor=4)
    encoder.add_head("task", "tagging", num_labels=2)
    encoder.train_adapter(Stack("en", "task"))
    for language in LANGUAGES:  # the task alone trains
        for parameter in encoder.parameters_of(language):
            parameter.requires_grad_(False)
    english = {name: tensor.clone() for name, tensor in encoder._tensors("en").items()}
    ids = torch.randint(10, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = (ids % 2 == 0).long()
    optimizer = torch.optim.AdamW([p for p in encoder.model.parameters() if p.requires_grad], 1e-2)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = encoder(input_ids=ids, labels=labels)["loss"]
        first = first or float(loss.detach())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * first
    assert all(torch.equal(tensor, english[name]) for name, tensor in encoder._tensors("en").items())
    encoder.model.eval()
    source = encoder(input_ids=ids)["logits"]
    encoder.set_active(Stack("qu", "task"))
    target = encoder(input_ids=ids + 15)["logits"]
    assert target.shape == source.shape and not torch.allclose(target, source)
    inverted = encoder.model.invertible_adapters["qu"]
    x = torch.randn(2, 3, 16)
    assert_close(inverted(inverted(x), inverse=True), x)


def _all(texts):
    return {n: torch.stack([texts[0, i][n] for i in range(len(texts))]) for n in ("input_ids", "labels")}


def _encoder_of(model):
    encoder = transformers.BertModel(model.config, add_pooling_layer=False)
    state = {n.removeprefix("bert."): t for n, t in model.state_dict().items() if n.startswith("bert.")}
    encoder.load_state_dict({n: t for n, t in state.items() if n in encoder.state_dict()})
    return encoder


def test_text_blocks(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("1 2 3 4\n\n5 6 7\n8 9 10 11 12\n")
    masking = masked_lm.Masking(mask_id=99, vocab_size=100, probability=0.5)
    texts = masked_lm.TextBlocks([file], lambda line: list(map(int, line.split())), 6, masking, first=97, last=98)
    assert texts.blocks.tolist() == [[97, 1, 2, 3, 4, 98], [97, 5, 6, 7, 8, 98], [97, 9, 10, 11, 12, 98]]
    kinds = {"kept": 0, "mask": 0, "other": 0}
    for epoch in range(200):
        item = texts[epoch, 1]
        asked = item["labels"] != masked_lm.IGNORED
        assert torch.equal(item["labels"][asked], texts.blocks[1][asked]) and not asked[[0, 5]].any()
        assert torch.equal(item["input_ids"][~asked], texts.blocks[1][~asked])
        for now, was in zip(item["input_ids"][asked].tolist(), item["labels"][asked].tolist(), strict=True):
            kinds["mask" if now == 99 else "kept" if now == was else "other"] += 1
    total = sum(kinds.values())
    assert 300 < total < 500 and 0.72 < kinds["mask"] / total < 0.88 and 0.05 < kinds["kept"] / total < 0.16
    assert all(torch.equal(texts[3, 1][n], texts[3, 1][n]) for n in ("input_ids", "labels"))
    for wrong, message in (([tmp_path / "none"], "cannot be read"), ([file], "one block of length 60 needs 58")):
        with pytest.raises(InputError, match=message):
            masked_lm.TextBlocks(wrong, lambda line: [1], 60, masking, first=97, last=98)


def test_public_names():
    assert set(adapterhub.__all__) == {"PRESETS", "AdapterConfig", "AdapterHub", "FusionConfig"}
