"""HyperGrid-T5: Hugging Face's T5 as the peer without grids, generation, published sizes, masks, files, bad input."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.t5 import modeling_t5

from mmkernels import _library, models
from mmkernels.models import hypergrid_t5, official
from mmkernels.models.hypergrid_t5 import CONFIGS, HyperGridT5, HyperGridT5Config
from mmkernels.modules import HyperGridLinear, set_backend
from mmkernels.modules.hypergrid import VARIANTS, HyperGrid
from mmkernels.testing import assert_within_budget, max_error

transformers.logging.set_verbosity_error()
BACKENDS = ["reference", "eager"] + (["cpp"] if _library.load("cpu").loaded else [])
FUSED = BACKENDS[-1]
# Distances above and below the last bucket, an odd head dim, a decoder of its own depth.
SIZES = dict(
    vocab_size=41,
    d_model=24,
    d_kv=7,
    d_ff=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
VERSIONS = {"1.0": SIZES, "1.1": SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)}
TINY = HyperGridT5Config(**{**SIZES, "d_kv": 8}, grid=(5, 3))  # blocks of 8


def peer(version, **changes):
    """Hugging Face's T5 with weights far from where they begin."""
    torch.manual_seed(0)
    config = VERSIONS[version] | changes
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    if version == "1.1":
        model.lm_head.weight = nn.Parameter(torch.randn(config["vocab_size"], config["d_model"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return config, model


def tiny(seed=0, **changes):
    """A model with grids and some spread in its norms and biases."""
    torch.manual_seed(seed)
    model = HyperGridT5(HyperGridT5Config(**vars(TINY) | {"backend": FUSED} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def assert_same(actual, expected, units=64):
    """Equal but for rounding, which another order of sums changes: so many units in the last place of the largest value."""
    bound = units * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound, (actual - expected).abs().max() / bound * units


def batch(size=3, length=9, target=20, seed=1):
    """Inputs padded on the right and on the left, targets that end early."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, SIZES["vocab_size"], (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.int64)
    mask[1, 6:], mask[2, :4] = 0, 0
    labels = torch.randint(2, SIZES["vocab_size"], (size, target), generator=generator)
    labels[1, 5:] = -100
    return ids, mask, labels


# --- Hugging Face's T5 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_norm(monkeypatch):
    """Hugging Face takes the mean square of a row, and in version 4 the softmax of scores, in float32 even of float64; here
    those of float64 are in float64.
    """

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    class KeepDouble(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.float and args[0].dtype == torch.float64:
                return args[0]
            return function(*args, **(kwargs or {}))

    attend = modeling_t5.T5Attention.forward

    def attention(self, *args, **kwargs):
        with KeepDouble():
            return attend(self, *args, **kwargs)

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)
    monkeypatch.setattr(modeling_t5.T5Attention, "forward", attention)


def logits_loss_and_gradients(model, ids, mask, labels):
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}  # a change of dtype takes a parameter's with it
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients


def assert_all_within_budget(results, exact, eager, what):
    """Every tensor within three times eager's error, or its largest: errors of few roundings reach all gradients alike."""
    typical = max(max_error(eager[n], exact[n]) / float(exact[n].abs().max()) for n in exact)
    for name, result in results.items():
        assert_within_budget(result, exact[name], eager[name], f"{name} {what}", factor=3.0, typical=typical)


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_with_transformers(version, exact_norm):
    config, theirs = peer(version)
    problem = batch()
    eager = logits_loss_and_gradients(theirs, *problem)
    ours = hypergrid_t5.from_official(config, theirs.state_dict())
    exact = logits_loss_and_gradients(theirs.double(), *problem)
    assert {name for name, _ in ours.named_parameters()} == set(exact) - {"logits", "loss"}
    for name, result in logits_loss_and_gradients(set_backend(ours.double(), "reference"), *problem).items():
        assert max_error(result, exact[name]) <= 1e-11 * max(1.0, float(exact[name].abs().max())), name
    for backend in BACKENDS:
        results = logits_loss_and_gradients(set_backend(ours.float(), backend), *problem)
        assert_all_within_budget(results, exact, eager, f"on {backend}")


@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_falls_where_it_does_in_transformers(version, exact_norm):
    config, theirs = peer(version, dropout_rate=0.3)
    ours = hypergrid_t5.from_official(config, theirs.state_dict(), backend="eager")
    ids, _, labels = batch()
    results = []
    for model in (theirs.double().train(), ours.double().train()):
        torch.manual_seed(5)  # what both draw, and in which order, is the same
        results.append(model(input_ids=ids, labels=labels).logits)
    assert max_error(*results) <= 1e-11 * float(results[0].detach().abs().max())
    assert max_error(results[1], ours.eval()(ids, labels=labels).logits) > 0.1


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets(bidirectional):
    distance = torch.arange(-300, 301)
    for buckets, longest in ((32, 128), (8, 12), (6, 300)):
        theirs = modeling_t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, longest)
        ours = hypergrid_t5.bucket(distance, buckets, longest, bidirectional=bidirectional)
        assert torch.equal(ours, theirs)
        assert ours.min() >= 0 and ours.max() < buckets


def hasty(version):
    """A peer, the same weights here, and an end token that both like to make."""
    config, theirs = peer(version, num_decoder_layers=2)  # its cache has as many layers as the encoder
    theirs.eval()
    ids, mask, _ = batch(16)
    endless = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    first = {token: [row.index(token) if token in row else 0 for row in endless.tolist()] for token in range(2, 41)}
    end = max(first, key=lambda token: len(set(first[token])))
    return end, theirs, hypergrid_t5.from_official(config | {"eos_token_id": end}, theirs.state_dict()).eval(), ids, mask


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_generation_as_in_transformers(version):
    end, theirs, ours, ids, mask = hasty(version)
    expected = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=end)
    actual = ours.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(actual, expected) and len({(row == end).int().argmax().item() for row in actual}) > 2


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("version", VERSIONS)
def test_beam_search_as_in_transformers(version, early_stopping):
    end, theirs, ours, ids, mask = hasty(version)

    def up_to_the_end(tokens):  # behind it Hugging Face repeats the end token here, where padding belongs
        return [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]

    found = set()
    for num_beams, length_penalty in ((2, 1.0), (3, 0.0), (4, 2.0), (4, -1.0), (5, 1.0)):
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        options |= {"attention_mask": mask, "max_new_tokens": 12}
        expected = theirs.generate(input_ids=ids, do_sample=False, eos_token_id=end, **options)
        actual = ours.generate(ids, **options)
        assert actual.shape == expected.shape and up_to_the_end(actual) == up_to_the_end(expected), options
        found |= {len(target) for target in up_to_the_end(actual)}
    assert len(found) > 3  # some end early


# --- Generation with grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_step_by_step_is_the_whole_forward_pass(variant):
    grid = {"row": (5, 1), "column": (1, 3)}.get(variant, (5, 3))
    model = tiny(variant=variant, grid=grid)
    ids, mask, _ = batch()
    made = model.generate(ids, attention_mask=mask, max_new_tokens=15)
    logits = model(ids, attention_mask=mask, decoder_input_ids=made[:, :-1]).logits
    ended = (made[:, :-1] == 1).any(1, keepdim=True) & ((made[:, :-1] == 1).cumsum(1) > 0)
    assert torch.equal(torch.where(ended, 0, logits.argmax(-1)), made[:, 1:])


def test_gates_are_made_once_for_each_example_and_not_for_each_beam():
    model, made = tiny(), []
    for module in model.modules():
        if isinstance(module, HyperGrid):
            module.register_forward_hook(lambda module, args, gate: made.append(tuple(gate.shape)))
    ids, mask, _ = batch()
    model.generate(ids, attention_mask=mask, max_new_tokens=7, num_beams=4)
    assert made == [(3, 5, 3)] * 5  # two layers of the encoder, three of the decoder


def test_cached_beams_are_those_of_whole_passes():
    model = tiny()
    ids, mask, _ = batch(6)
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=9, num_beams=3, length_penalty=0.6)
    rows = torch.arange(6).repeat_interleave(3)
    history = []

    def step(tokens):
        history.append(tokens)
        decoded = model(ids[rows], attention_mask=mask[rows], decoder_input_ids=torch.stack(history, -1).flatten(0, 1)).logits
        return decoded[:, -1].unflatten(0, (6, 3))

    def reorder(numbers):
        history[:] = [tokens.flatten()[numbers].view(6, 3) for tokens in history]

    running = torch.zeros(6, 3, 10, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(hypergrid_t5.beam_search(step, reorder, running, 1, 0.6, False), cached)


def test_beam_search_finds_what_greedy_misses():
    """A known machine: token 2 looks best at first and leads nowhere, token 3 leads to a sure end."""
    after = {0: {2: 0.6, 3: 0.4}, 2: {4: 0.3, 5: 0.3, 1: 0.2, 2: 0.2}, 3: {1: 1.0}}

    def step(tokens):
        chances = torch.full((*tokens.shape, 8), 1e-6)
        for place in torch.cartesian_prod(*map(torch.arange, tokens.shape)):
            for token, chance in after.get(int(tokens[tuple(place)]), {1: 1.0}).items():
                chances[(*place, token)] = chance
        return chances.log()

    running = torch.zeros(2, 3, 5, dtype=torch.int64)
    assert hypergrid_t5.greedy(step, running[:, 0].clone(), 1).tolist() == [[0, 2, 4, 1]] * 2
    for early_stopping in (True, False, "never"):
        found = hypergrid_t5.beam_search(step, lambda rows: None, running, 1, 0.0, early_stopping)
        assert found.tolist() == [[0, 3, 1]] * 2


# --- Sizes -------------------------------------------------------------------------------------------------------------------

# As released: T5 1.0 shares one embedding of 32128 tokens, 1.1 has a head of its own.
RELEASED = {
    "hypergrid-t5-small": 60_506_624,
    "hypergrid-t5-base": 222_903_552,
    "hypergrid-t5-large": 737_668_096,
    "hypergrid-t5-3b": 2_851_598_336,
    "hypergrid-t5-11b": 11_307_321_344,
    "hypergrid-t5-v1.1-small": 76_961_152,
    "hypergrid-t5-v1.1-base": 247_577_856,
    "hypergrid-t5-v1.1-large": 783_150_080,
    "hypergrid-t5-v1.1-xl": 2_849_757_184,
    "hypergrid-t5-v1.1-xxl": 11_135_332_352,
}
ADDED = {"base": 1_179_648, "large": 3_145_728, "3b": 3_145_728, "11b": 3_145_728}  # by grids of 32 x 32, L2


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(name):
    plain, gated = models.load(name, device="meta", grid=None), models.load(name, device="meta")
    assert count(plain) == RELEASED[name]
    size = name.rpartition("-")[2]
    if "v1.1" not in name and size in ADDED:
        assert count(gated) - count(plain) == ADDED[size]
    config = CONFIGS[name]
    fields = {n: getattr(config, n) for n in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")}
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)).state_dict()
    ours = plain.state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: theirs[n].shape for n in ours}
    assert {n for n in theirs if n not in ours} <= {*hypergrid_t5.COPIES, "lm_head.weight"}


def test_parameters_that_each_variant_adds():
    for variant, added in (
        ("L2", 24 * 8),
        ("LG", 24 * 5 + 3),
        ("GL", 5 + 24 * 3),
        ("GG", 8),
        ("row", 24 * 5),
        ("column", 24 * 3),
    ):
        grid = {"row": (5, 1), "column": (1, 3)}.get(variant, (5, 3))
        fields = vars(TINY) | {"variant": variant, "grid": grid}
        gated, plain = (HyperGridT5(HyperGridT5Config(**fields | change), device="meta") for change in ({}, {"grid": None}))
        assert count(gated) - count(plain) == 5 * added


# --- Masks, states, training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_reaches_nothing(backend):
    model = tiny(feed_forward_proj="gated-gelu", backend=backend)
    ids, mask, labels = batch()
    other = torch.where(mask.bool(), ids, 7)
    first, second = (model(i, attention_mask=mask, labels=labels) for i in (ids, other))
    assert torch.equal(first.logits, second.logits) and torch.equal(first.loss, second.loss)
    memory = model.encode(ids, attention_mask=mask)
    assert (memory[~mask.bool()] == 0).all() and memory[mask.bool()].abs().min(-1).values.max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_example_alone_is_what_it_is_in_a_batch(backend):
    """Typically of five networks: rounding grows in some, eager's too. What padding reaches is off in all of them."""
    ids, mask, labels = batch()
    pairs = []
    for seed in range(5):
        model = tiny(seed, feed_forward_proj="gated-gelu", backend=backend)
        whole = model(ids, attention_mask=mask, labels=labels).logits
        left = model(ids[2:, 4:], labels=labels[2:]).logits  # padded on the left, and so are its gates' first tokens
        pairs.append([(left, whole[2:]), (model(ids[1:2, :6], labels=labels[1:2]).logits, whole[1:2])])
    for of_networks in zip(*pairs, strict=True):
        assert_same(*sorted(of_networks, key=lambda pair: float((pair[0] - pair[1]).abs().max() / pair[1].abs().max()))[2])


def test_an_example_of_padding_alone():
    model = tiny()
    ids, mask, labels = batch()
    mask[0], labels[0] = 0, -100
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    rest = model(ids[1:], attention_mask=mask[1:], labels=labels[1:])
    assert_same(out.loss, rest.loss)
    assert_same(out.logits[1:], rest.logits)
    nothing = model(ids, labels=torch.full_like(labels, -100)).loss
    assert nothing == 0


def test_empty_batches():
    model = tiny()
    ids, mask, labels = (tensor[:0] for tensor in batch())
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.logits.shape == (0, 20, 41) and out.loss == 0
    assert all(model.generate(ids, num_beams=num_beams).shape[0] == 0 for num_beams in (1, 3))


def test_later_targets_change_nothing_before_them():
    model = tiny()
    ids, mask, labels = batch(target=8)
    labels = labels.clamp(min=2)
    whole = model(ids, attention_mask=mask, labels=labels)
    changed = labels.clone()
    changed[:, 4:] = 3
    other = model(ids, attention_mask=mask, labels=changed)
    assert torch.equal(whole.logits[:, :5], other.logits[:, :5])
    assert not torch.allclose(whole.logits[:, 5:], other.logits[:, 5:])
    shifted = model.shift_right(labels)
    assert torch.equal(model(ids, attention_mask=mask, decoder_input_ids=shifted).logits, whole.logits)
    padded = torch.cat([torch.full((3, 2), 9), shifted], 1)  # on the left, behind a mask
    left = torch.ones_like(padded).index_fill(1, torch.tensor([0, 1]), 0)
    behind = model(ids, attention_mask=mask, decoder_input_ids=padded, decoder_attention_mask=left)
    assert_same(behind.logits[:, 2:], whole.logits)


def test_a_local_state_of_the_callers_own():
    model = tiny()
    ids, mask, labels = batch()
    state = torch.randn(3, SIZES["d_model"], requires_grad=True)
    given = model(ids, attention_mask=mask, labels=labels, local_state=state)
    given.loss.backward()
    assert state.grad.abs().min() > 0
    assert not torch.allclose(given.logits, model(ids, attention_mask=mask, labels=labels).logits)
    made = model.generate(ids, attention_mask=mask, local_state=state, max_new_tokens=6)
    logits = model(ids, attention_mask=mask, decoder_input_ids=made[:, :-1], local_state=state).logits
    assert torch.equal(made[:, 1], logits[:, 0].argmax(-1))


def test_backends_agree_and_every_parameter_has_a_gradient():
    problem = batch()
    for gated in ("relu", "gated-gelu"):
        model = tiny(feed_forward_proj=gated, d_model=48)
        exact = logits_loss_and_gradients(set_backend(model.double(), "reference"), *problem)
        eager = logits_loss_and_gradients(set_backend(model.float(), "eager"), *problem)
        fused = logits_loss_and_gradients(set_backend(model, FUSED), *problem)
        assert all(value.abs().max() > 0 for value in exact.values())
        assert_all_within_budget(fused, exact, eager, gated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = tiny()
    ids, mask, labels = batch()
    exact = set_backend(copy.deepcopy(model).double(), "reference")(ids, attention_mask=mask, labels=labels)
    plain = set_backend(copy.deepcopy(model), "eager")
    with torch.autocast("cpu", dtype):
        mixed, eager = (m(ids, attention_mask=mask, labels=labels) for m in (model, plain))
    assert mixed.loss.dtype == torch.float32
    assert_within_budget(mixed.logits, exact.logits, eager.logits, "logits under autocast")
    out, eager = (m.to(dtype)(ids, attention_mask=mask, labels=labels) for m in (model, plain))
    assert out.logits.dtype == dtype and out.loss.isfinite()
    assert_within_budget(out.logits, exact.logits, eager.logits, f"logits in {dtype}")
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.generate(ids, max_new_tokens=3, num_beams=2).shape[0] == 3


def test_activations_beyond_float16_stay_finite():
    model = tiny()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[-1].inner.wo.weight.mul_(1e4)
    ids, _, labels = batch()
    assert model.half()(ids, labels=labels).logits.isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_begins_where_transformers_does(version):
    sizes = VERSIONS[version] | dict(d_model=96, d_ff=200, d_kv=16, num_heads=8, vocab_size=300)
    ours = HyperGridT5(HyperGridT5Config(**sizes, grid=(5, 4)))
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).state_dict()
    for name, parameter in ours.named_parameters():
        if ".hypergrid." in name:
            assert float(parameter.detach().std()) == pytest.approx(96**-0.5, rel=0.2), name
        elif name == "lm_head.weight":  # theirs is tied by now; it begins as the embedding does
            assert float(parameter.detach().std()) == pytest.approx(1.0, rel=0.05), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, theirs[name]), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(float(theirs[name].std()), rel=0.2), name


@pytest.mark.parametrize("version", VERSIONS)
def test_learns_a_few_targets_and_generates_them(version):
    torch.manual_seed(0)
    sizes = VERSIONS[version] | dict(num_decoder_layers=2, dropout_rate=0.0)
    model = HyperGridT5(HyperGridT5Config(**sizes, grid=(5, 3), backend=FUSED)).train()
    ids, mask, _ = batch(4)
    labels = torch.tensor([[7, 3, 9, 1, -100], [4, 1, -100, -100, -100], [12, 12, 5, 6, 1], [3, 4, 1, -100, -100]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    for _ in range(120):
        optimizer.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    for num_beams in (1, 3):
        made = model.eval().generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=num_beams)
        assert torch.equal(made[:, 1:], labels.clamp(min=0))


def test_compiles_into_one_graph():
    model = tiny(num_layers=1, num_decoder_layers=1)
    ids, mask, labels = batch(target=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = (m(ids, attention_mask=mask, labels=labels).loss for m in (compiled, model))
    assert_same(actual, expected)
    for pair in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (actual, expected)), strict=True):
        assert_same(*pair)


# --- Files -------------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = tiny(variant="LG")
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path, backend="eager").eval()
    assert loaded.config.grid == (5, 3) and loaded.config.variant == "LG"
    ids, mask, labels = batch()
    assert_same(loaded(ids, labels=labels).logits, model(ids, labels=labels).logits)
    with pytest.raises(models.InputError, match=r"unknown"):
        models.load(tmp_path, grid=None)


@pytest.mark.parametrize("version", VERSIONS)
def test_grids_beside_a_checkpoint(version):
    config, theirs = peer(version)
    state = theirs.state_dict()
    state[hypergrid_t5.UNUSED] = torch.zeros(8, 3)  # the first checkpoints have it
    gated = hypergrid_t5.from_official(config, state, grid=(5, 3), variant="GL", residual=False)
    assert all(p.isfinite().all() for p in gated.parameters())
    for name, tensor in state.items():
        if name in gated.state_dict():
            assert torch.equal(gated.state_dict()[name], tensor), name
    grids = [module for module in gated.modules() if isinstance(module, HyperGridLinear)]
    assert len(grids) == 5 and all(module.hypergrid.G_r.std() > 0 for module in grids)
    again = hypergrid_t5.from_official(config, gated.state_dict(), grid=(5, 3), variant="GL", residual=False)
    ids, _, labels = batch()
    assert torch.equal(again(ids, labels=labels).logits, gated(ids, labels=labels).logits)


def test_grids_beside_a_model():
    model = tiny(grid=None)
    ids, _, labels = batch()
    before = model(ids, labels=labels).logits
    names = set(model.state_dict())
    weights = [block.layer[-1].inner.wo.weight for block in model.encoder.block]
    assert hypergrid_t5.add_grids(model, (5, 3)) is model
    assert set(model.state_dict()) - names == {n for n in model.state_dict() if ".wo.hypergrid.L_" in n}
    assert all(block.layer[-1].inner.wo.weight is w for block, w in zip(model.encoder.block, weights, strict=True))
    with torch.no_grad():  # 1 + S is 3 / 2 without factors: undo it, and nothing has changed
        for module in model.modules():
            if isinstance(module, HyperGridLinear):
                module.hypergrid.L_r.zero_()
                module.weight.div_(1.5)
    assert_same(model(ids, labels=labels).logits, before)
    with pytest.raises(ValueError, match=r"model has grids of \(5, 3\); it must be a T5 without"):
        hypergrid_t5.add_grids(model, (5, 3))


@pytest.mark.parametrize("layout", ["safetensors", "shards", "pickle", "transformers"])
def test_folders_of_huggingface(tmp_path, layout):
    config, theirs = peer("1.0")
    state = {n: t for n, t in theirs.state_dict().items() if n not in (*hypergrid_t5.COPIES, "lm_head.weight")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["x"]}))
    if layout == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif layout == "pickle":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    elif layout == "transformers":
        theirs.save_pretrained(tmp_path)
    else:
        places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
        for file in set(places.values()):
            save_file({n: t for n, t in state.items() if places[n] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    ours = hypergrid_t5.from_official(*official.read_huggingface(tmp_path)).eval()
    ids, _, labels = batch()
    assert max_error(ours(ids, labels=labels).logits, theirs.eval()(input_ids=ids, labels=labels).logits) < 1e-4


def test_broken_folders_of_huggingface(tmp_path):
    with pytest.raises(models.InputError, match=r"config.json cannot be read as JSON"):
        official.read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(models.InputError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        official.read_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(models.InputError, match=r"pytorch_model.bin cannot be read as tensors"):
        official.read_huggingface(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(models.InputError, match=r"has no 'weight_map'"):
        official.read_huggingface(tmp_path)


# --- Bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (r"d_model is 0; it must be an integer of 1 or more", {"d_model": 0}),
        (r"num_decoder_layers is -1; it must be", {"num_decoder_layers": -1}),
        (r"relative_attention_num_buckets is 2; it must be an integer of 4 or more", {"relative_attention_num_buckets": 2}),
        (r"relative_attention_max_distance is 4; it must be above half", {"relative_attention_max_distance": 4}),
        (r"feed_forward_proj is 'gated-silu'; allowed are 'relu', 'gated-gelu'", {"feed_forward_proj": "gated-silu"}),
        (r"variant is 'LL'; allowed are 'L2'", {"variant": "LL"}),
        (r"grid is \(5, 3, 1\); it must be a pair", {"grid": (5, 3, 1)}),
        (r"grid is \(7, 3\); R = 7 must divide in_features = 40", {"grid": (7, 3)}),
        (r"eos_token_id is 41; it must be below vocab_size, 41", {"eos_token_id": 41}),
        (r"dropout_rate is 1.0; it must be a number in \[0, 1\)", {"dropout_rate": 1.0}),
        (r"layer_norm_epsilon is 0; it must be a number above 0", {"layer_norm_epsilon": 0}),
        (r"backend is 'magic'; allowed are", {"backend": "magic"}),
    ],
)
def test_bad_configs(message, fields):
    with pytest.raises(ValueError, match=message):
        HyperGridT5(HyperGridT5Config(**vars(TINY) | fields))


def test_bad_calls():
    model = tiny()
    ids, mask, labels = batch()
    state = torch.zeros(3, 5)
    for error, message, call in (
        (ValueError, "labels and decoder_input_ids are None", lambda: model(ids)),
        (TypeError, r"input_ids is a torch.float32; it must be", lambda: model(ids.float(), labels=labels)),
        (ValueError, r"input_ids has shape \(9,\); it must be \(B, T\)", lambda: model(ids[0], labels=labels)),
        (
            ValueError,
            r"input_ids has 41; ids are 0 to 40",
            lambda: model(ids.index_fill(1, labels[0, :1] * 0, 41), labels=labels),
        ),
        (ValueError, r"labels has -3; ids are 0 to 40, or -100", lambda: model(ids, labels=labels.clamp(max=-3))),
        (ValueError, r"labels has shape \(2, 20\); it must be \(3, T\)", lambda: model(ids, labels=labels[:2])),
        (
            ValueError,
            r"labels has shape \(3, 20\); it must be that of decoder_input_ids, \(3, 9\)",
            lambda: model(ids, labels=labels, decoder_input_ids=ids),
        ),
        (ValueError, r"attention_mask has shape \(3, 8\)", lambda: model(ids, labels=labels, attention_mask=mask[:, 1:])),
        (TypeError, r"attention_mask is a torch.float32", lambda: model(ids, labels=labels, attention_mask=mask.float())),
        (ValueError, r"local_state is of shape \(3, 5\); .* \(3, 24\)", lambda: model(ids, labels=labels, local_state=state)),
        (ValueError, r"num_beams is 0; it must be", lambda: model.generate(ids, num_beams=0)),
        (ValueError, r"num_beams is 21; it must be at most half of vocab_size", lambda: model.generate(ids, num_beams=21)),
        (ValueError, r"max_new_tokens is 0; it must be", lambda: model.generate(ids, max_new_tokens=0)),
        (ValueError, r"early_stopping is 'soon'; allowed are", lambda: model.generate(ids, early_stopping="soon")),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_checkpoints():
    config, theirs = peer("1.0")
    state = theirs.state_dict()
    for error, message, changed, entries in (
        (ValueError, r"config has model_type 'bert'; allowed are 't5' and 'mt5'", {"model_type": "bert"}, {}),
        (
            ValueError,
            r"state_dict has 'encoder.embed_tokens.weight', which is not",
            {},
            {"encoder.embed_tokens.weight": state["shared.weight"] + 1},
        ),
        (ValueError, r"state_dict does not fit the model: bert.weight is unknown", {}, {"bert.weight": torch.zeros(1)}),
        (ValueError, r"d_ff|shape", {"d_ff": 48}, {}),
        (ValueError, r"all must have one floating-point dtype", {}, {"shared.weight": state["shared.weight"].double()}),
        (TypeError, r"state_dict has 'x': a int", {}, {"x": 3}),
    ):
        with pytest.raises(error, match=message):
            hypergrid_t5.from_official(config | changed, state | entries)
    del state["decoder.final_layer_norm.weight"]
    with pytest.raises(ValueError, match=r"decoder.final_layer_norm.weight is missing"):
        hypergrid_t5.from_official(config, state)
