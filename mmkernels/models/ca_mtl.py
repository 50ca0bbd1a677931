"""CA-MTL (Pilault et al., ICLR 2021): one BERT for many tasks, which modulate its norms, its attention and a bottleneck.

    z0 = E[task],  z = W_z z0 + b_z                                  a row for each task
    x <- FiLM_z0(Drop(LN(word + position + token type)))             conditional alignment
    layers:  a = Norm(x + Drop(W_o Attention_z(x))),  x <- Norm(a + Drop(W_2 GELU(W_1 a)))
             the norms of the upper half conditional on z
    base:    in the last layer x <- Norm_z(Bottleneck_z(x) + a)
    large:   a bottleneck for each layer beside the stream, f <- Bottleneck_z(x + f), f = 0 at first; f is the encoder's output
    logits = W_task Drop(tanh(W_p x[0]))                             a head for each task

A batch may hold rows of any tasks. Sequences are padded to `max_seq_length`: the attention's bias has a row for each place.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..modules import ConditionalAlignment, ConditionalAttention, ConditionalBottleneck, ConditionalLayerNorm
from ..modules.backend import WithBackend, own_backend
from ..modules.conditional import add_norm, linear
from ..ops._shared.arguments import check_index, check_integer, check_number
from . import official
from .registry import load_weights, save_pretrained

VARIANTS = ("base", "large")
# GLUE without WNLI, in the released order, which numbers the tasks, with their classes; a regression has one.
GLUE = {"cola": 2, "mnli": 3, "rte": 2, "qqp": 2, "stsb": 1, "sst2": 2, "qnli": 2, "mrpc": 2}


@dataclasses.dataclass(frozen=True)
class CAMTLConfig:
    """Sizes of a BERT, under Hugging Face's names, and its tasks."""

    variant: str = "base"  # "large" has a bottleneck beside every layer
    tasks: tuple = tuple(GLUE)
    num_labels: tuple = tuple(GLUE.values())  # of each task; 1 is a regression
    max_seq_length: int = 128
    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    backend: str = "auto"  # of every layer; "eager" is plain PyTorch

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; allowed are {', '.join(map(repr, VARIANTS))}")
        for name in ("tasks", "num_labels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise ValueError(f"{name} is {value!r}; it must be a list with an entry for each task")
            object.__setattr__(self, name, tuple(value))  # JSON has lists only
        if len(set(self.tasks)) != len(self.tasks) or not all(isinstance(task, str) for task in self.tasks):
            raise ValueError(f"tasks is {self.tasks!r}; it must have a different name for each task")
        if len(self.num_labels) != len(self.tasks):
            raise ValueError(
                f"num_labels has {len(self.num_labels)} entries; it must have one for each of {len(self.tasks)} tasks"
            )
        for i, number in enumerate(self.num_labels):
            check_integer(f"num_labels[{i}]", number)
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_seq_length", "max_position_embeddings", "type_vocab_size"):
            check_integer(name, getattr(self, name))
        check_integer("pad_token_id", self.pad_token_id, 0)
        check_number("layer_norm_eps", self.layer_norm_eps, "a number of 0 or more", lambda eps: eps >= 0.0)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_number(name, getattr(self, name), "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
        if self.max_seq_length > self.max_position_embeddings:
            raise ValueError(
                f"max_seq_length is {self.max_seq_length}; it must be at most max_position_embeddings, "
                f"{self.max_position_embeddings}"
            )
        if self.hidden_size % self.max_seq_length:
            raise ValueError(f"max_seq_length is {self.max_seq_length}; it must divide hidden_size, {self.hidden_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; it must divide hidden_size, {self.hidden_size}"
            )
        if self.variant == "base" and self.num_hidden_layers % 2:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; variant 'base' needs an even number")

    @property
    def block(self) -> int:
        """Rows and columns of a diagonal block of the attention's bias."""
        return -(-self.max_seq_length // (self.hidden_size // self.max_seq_length))

    @property
    def plain_layers(self) -> int:
        """How many layers have ordinary norms: the lower half."""
        return -(-self.num_hidden_layers // 2)


_LARGE = dict(variant="large", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
CONFIGS = {
    "ca-mtl-base": CAMTLConfig(),
    "ca-mtl-large": CAMTLConfig(**_LARGE),
    "ca-mtl-tiny": CAMTLConfig(
        vocab_size=8192,
        hidden_size=128,
        max_seq_length=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    ),
}


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: torch.Tensor  # (B, K), K the most classes that a task has; -inf behind those of a row's own task
    loss: torch.Tensor | None  # the mean over the tasks present of the means over their rows; None without labels
    task_losses: torch.Tensor | None  # (tasks,), 0 for those that are not present
    sequence: torch.Tensor  # (B, L, H)
    pooled: torch.Tensor  # (B, H)


class Layer(WithBackend):
    """A layer of BERT with conditional attention, and conditional norms or ordinary ones."""

    def __init__(self, config, *, conditional, **factory):
        super().__init__(config.backend)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.dropout = config.hidden_dropout_prob
        self.attention = ConditionalAttention(
            size,
            size,
            config.max_seq_length,
            config.block,
            num_heads=config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            backend=config.backend,
            **factory,
        )
        self.proj = nn.Linear(size, size, **factory)
        self.fc1 = nn.Linear(size, config.intermediate_size, **factory)
        self.fc2 = nn.Linear(config.intermediate_size, size, **factory)
        if conditional:
            self.norm1, self.norm2 = (
                ConditionalLayerNorm(size, size, eps=eps, backend=config.backend, **factory) for _ in range(2)
            )
        else:
            self.norm1, self.norm2 = (nn.LayerNorm(size, eps=eps, **factory) for _ in range(2))

    def forward(self, x, tasks, index=None, key_mask=None, modulation=None):
        """(B, L, H) -> the attention's output and the layer's, which `modulation`, a FiLM's rows, follows."""
        attended = self._add(self.norm1, x, self.attention(x, tasks, index, key_mask=key_mask), self.proj, tasks, index)
        if self.backend == "eager":
            hidden = F.gelu(self.fc1(attended))
        else:
            hidden = linear(attended, self.fc1.weight, None, self.backend)
            hidden = ops.bias_gelu(hidden, self.fc1.bias, approximate="none", backend=own_backend(self.backend))
        return attended, self._add(self.norm2, attended, hidden, self.fc2, tasks, index, modulation)

    def _add(self, norm, x, branch, projection, tasks, index, modulation=None):
        """Norm(x + Drop(projection(branch))); the norm adds the projection's bias where nothing is dropped between the two."""
        dropping = self.training and self.dropout > 0.0
        bias = projection.bias
        if self.backend == "eager" or dropping:
            bias = None
        branch = linear(branch, projection.weight, projection.bias if bias is None else None, self.backend)
        branch = F.dropout(branch, self.dropout, self.training)
        if isinstance(norm, ConditionalLayerNorm):
            return norm(x, tasks, index, branch=branch, branch_bias=bias, modulation=modulation)
        return add_norm(x, norm.weight, norm.bias, norm.eps, None, self.backend, branch, bias)


class CAMTL(WithBackend):
    """A classifier of texts and pairs of texts for several tasks (the arguments are in the config)."""

    def __init__(self, config: CAMTLConfig, *, device=None, dtype=None):
        super().__init__(config.backend)
        self.config = config
        factory = {"device": device, "dtype": dtype}
        size, layers, base = config.hidden_size, config.num_hidden_layers, config.variant == "base"
        self.word = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id, **factory)
        self.position = nn.Embedding(config.max_position_embeddings, size, **factory)
        self.token_type = nn.Embedding(config.type_vocab_size, size, **factory)
        self.task = nn.Embedding(len(config.tasks), size, **factory)
        norms = {"eps": config.layer_norm_eps, "backend": config.backend}
        self.alignment = ConditionalAlignment(size, size, dropout=config.hidden_dropout_prob, **norms, **factory)
        self.transform = nn.Linear(size, size, **factory)
        self.layers = nn.ModuleList(Layer(config, conditional=i >= config.plain_layers, **factory) for i in range(layers))
        self.bottlenecks = nn.ModuleList(ConditionalBottleneck(size, size, **factory) for _ in range(1 if base else layers))
        self.bottleneck_norm = ConditionalLayerNorm(size, size, **norms, **factory) if base else None
        self.pooler = nn.Linear(size, size, **factory)
        self.heads = nn.ModuleList(nn.Linear(size, number, **factory) for number in config.num_labels)
        # Where the columns of a task's head lie among those of all, as (tasks, K); what stands behind its own is masked.
        counts = torch.tensor(config.num_labels)
        columns = torch.arange(int(counts.max()))
        first = counts.cumsum(0) - counts
        # On the device of the values that they index, also where the model is made on "meta" and then loaded.
        device = torch.device("cpu") if device is None else torch.device(device)
        self.register_buffer("columns", (first[:, None] + columns.clamp(max=counts[:, None] - 1)).to(device), persistent=False)
        self.register_buffer("counts", counts.to(device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Weights of deviation 0.02, biases and the attentions' matrices zero, norms one and zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, ConditionalLayerNorm)):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ConditionalAttention):
                nn.init.zeros_(module.matrix)

    def forward(self, input_ids, task_id, *, attention_mask=None, token_type_ids=None, labels=None) -> Output:
        """Logits of rows of any tasks.

        Args:
            input_ids: int64 (B, max_seq_length).
            task_id: int64 (B,), numbers of the config's tasks.
            attention_mask: (B, max_seq_length), non-zero where there is text; None: everywhere.
            token_type_ids: int64 (B, max_seq_length); None: zeros.
            labels: (B,), the number of a row's class, or what a regression is to give.

        Raises ValueError, TypeError or IndexError for wrong shapes, dtypes and numbers.
        """
        sequence, pooled = self.encode(input_ids, task_id, attention_mask=attention_mask, token_type_ids=token_type_ids)
        features = F.dropout(pooled, self.config.hidden_dropout_prob, self.training)
        # One product for the heads of all tasks, of which every row takes its own: no row is sorted, and nothing waits.
        every = F.linear(features, torch.cat([h.weight for h in self.heads]), torch.cat([h.bias for h in self.heads]))
        counts = self.counts[task_id]
        behind = torch.arange(self.columns.shape[1], device=every.device) >= counts[:, None]
        logits = every.gather(1, self.columns[task_id]).masked_fill(behind, float("-inf"))
        loss = task_losses = None
        if labels is not None:
            loss, task_losses = self._loss(logits, task_id, labels, counts == 1)
        return Output(logits, loss, task_losses, sequence, pooled)

    def encode(self, input_ids, task_id, *, attention_mask=None, token_type_ids=None) -> tuple:
        """The last rows (B, L, H) and the pooled first one (B, H)."""
        self._check(input_ids, task_id, attention_mask, token_type_ids)
        present, index = self._present(task_id)
        tasks0 = self.task(present)
        tasks = self.transform(tasks0)
        key_mask = None if attention_mask is None else attention_mask != 0
        places = self.position.weight[: input_ids.shape[1]]
        if token_type_ids is None:
            branch = (places + self.token_type.weight[0]).expand(input_ids.shape[0], -1, -1)
        else:
            branch = places + self.token_type(token_type_ids)
        x = self.alignment(self.word(input_ids), tasks0, index, branch=branch)
        if self.config.variant == "base":
            *lower, last = self.layers
            for layer in lower:
                _, x = layer(x, tasks, index, key_mask)
            bottleneck = self.bottlenecks[0]
            attended, x = last(x, tasks, index, key_mask, bottleneck.rows(tasks))
            x = bottleneck.up(bottleneck.down(x))
            sequence = self.bottleneck_norm(x, tasks, index, branch=attended)
        else:
            sequence = None
            for layer, bottleneck in zip(self.layers, self.bottlenecks, strict=True):
                _, x = layer(x, tasks, index, key_mask)
                sequence = bottleneck(x if sequence is None else x + sequence, tasks, index)
        return sequence, torch.tanh(self.pooler(sequence[:, 0]))

    def freeze(self, first: int, last: int) -> None:
        """Stops the training of the embeddings and of the layers from `first` to `last`, as the released code does.

        What goes on in those layers: the attentions' matrices, the modulation of norms, the bottleneck. The modulation of the
        attentions stays as it is: released so.
        """
        if not 0 <= first <= last < len(self.layers):
            raise ValueError(f"the layers from {first} to {last} are to be frozen; the model has 0 to {len(self.layers) - 1}")
        frozen = [self.word, self.position, self.token_type, self.alignment.norm]
        for module in (*frozen, *self.layers[first : last + 1]):
            module.requires_grad_(False)
        for layer in self.layers[first : last + 1]:
            layer.attention.matrix.requires_grad_()
            for norm in (layer.norm1, layer.norm2):
                if isinstance(norm, ConditionalLayerNorm):
                    norm.film.requires_grad_()

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors into the folder `path`; `mmkernels.models.load(path)` reads them."""
        save_pretrained(self, path)

    def _present(self, task_id):
        """(the tasks present, the place of each row's among them). On a GPU, which would have to be waited for, all tasks."""
        if task_id.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.unique(task_id, return_inverse=True)
        return torch.arange(len(self.config.tasks), device=task_id.device), task_id

    def _loss(self, logits, task_id, labels, regression):
        """The mean over the tasks present, and each task's own."""
        if labels.shape != task_id.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be ({task_id.shape[0]},)")
        logits = logits.float()
        classes = torch.where(regression, 0, labels.to(torch.int64))
        entropy = -torch.log_softmax(logits, 1).gather(1, classes[:, None])[:, 0]
        losses = torch.where(regression, (logits[:, 0] - labels.to(logits.dtype)) ** 2, entropy)
        rows = task_id == torch.arange(len(self.config.tasks), device=task_id.device)[:, None]  # (tasks, B)
        counts = rows.sum(1)
        means = torch.where(rows, losses, 0.0).sum(1) / counts.clamp(min=1)
        return means.sum() / (counts > 0).sum(), means

    def _check(self, input_ids, task_id, attention_mask, token_type_ids):
        length = self.config.max_seq_length
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.shape[1] != length:
            what = (
                f"shape {tuple(input_ids.shape)}"
                if isinstance(input_ids, torch.Tensor)
                else f"type {type(input_ids).__name__}"
            )
            raise ValueError(f"input_ids has {what}; it must be (B, {length}), padded to max_seq_length")
        check_index("task_id", task_id, ((input_ids.shape[0],),), len(self.config.tasks), "tasks", input_ids.device)
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; it must be that of input_ids, {tuple(input_ids.shape)}"
                )


CONFIG, MODEL = CAMTLConfig, CAMTL


# --- The released checkpoints ------------------------------------------------------------------------------------------------

_MODULATION = "gb_weights"


def official_names(config: CAMTLConfig) -> dict:
    """{name of a parameter here: its name in the released code}; of `qkv` the names of the three that it is made of."""
    names = {}

    def add(target, source, parts=("weight", "bias")):
        for part in parts:
            names[f"{target}.{part}"] = f"{source}.{part}"

    for ours, theirs in (("word", "word"), ("position", "position"), ("token_type", "token_type")):
        add(ours, f"bert.embeddings.{theirs}_embeddings", ("weight",))
    add("alignment.norm", "bert.embeddings.LayerNorm")
    add("alignment.film.linear", f"bert.conditional_alignment.{_MODULATION}")
    add("task", "bert.task_type_embeddings", ("weight",))
    add("transform", "bert.encoder.task_transformation")
    last = config.num_hidden_layers - 1
    for i in range(config.num_hidden_layers):
        source = f"bert.encoder.layer.{i}"
        new = "new_" if config.variant == "base" and i == last else ""
        attention = f"{source}.{new}attention"
        for part in ("weight", "bias"):
            names[f"layers.{i}.attention.qkv.{part}"] = tuple(
                f"{attention}.self.{name}.{part}" for name in ("query", "key", "value")
            )
        names[f"layers.{i}.attention.matrix"] = f"{attention}.self.random_weight_matrix"
        add(f"layers.{i}.attention.film.linear", f"{attention}.self.cond_block_diag_attn.{_MODULATION}")
        add(f"layers.{i}.proj", f"{attention}.output.dense")
        add(f"layers.{i}.fc1", f"{source}.{new}intermediate.dense")
        add(f"layers.{i}.fc2", f"{source}.{new}output.dense")
        for norm, theirs in (("norm1", f"{attention}.output.LayerNorm"), ("norm2", f"{source}.{new}output.LayerNorm")):
            add(f"layers.{i}.{norm}", theirs)
            if i >= config.plain_layers:
                add(f"layers.{i}.{norm}.film.linear", f"{theirs}.ln_weight_modulation.{_MODULATION}")
    if config.variant == "base":
        adapter = f"bert.encoder.layer.{last}.adapter"
        bottlenecks = {0: f"{adapter}.bottleneck"}
        add("bottleneck_norm", f"{adapter}.condlayernorm")
        add("bottleneck_norm.film.linear", f"{adapter}.condlayernorm.ln_weight_modulation.{_MODULATION}")
    else:
        bottlenecks = {i: f"bert.encoder.adapter_layer.{i}" for i in range(last + 1)}
    for i, source in bottlenecks.items():
        add(f"bottlenecks.{i}.transform", f"{source}.emb_transf")
        add(f"bottlenecks.{i}.film.linear", f"{source}.hidden_modulation.{_MODULATION}")
        add(f"bottlenecks.{i}.down", f"{source}.down_proj_layer")
        add(f"bottlenecks.{i}.up", f"{source}.up_proj_layer")
    add("pooler", "bert.pooler.dense")
    for i in range(len(config.tasks)):
        add(f"heads.{i}", f"decoders.{i}.model")
    return names


def _sizes(config: dict, state: dict, **tasks) -> CAMTLConfig:
    """The config of a BERT's config and tensors."""
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"hidden_act is {activation!r}; only 'gelu' is supported")
    names = ("num_attention_heads", "layer_norm_eps", "pad_token_id", "hidden_dropout_prob", "attention_probs_dropout_prob")
    fields = {name: config[name] for name in names if name in config}
    if "num_attention_heads" not in fields:
        raise ValueError(f"config has no 'num_attention_heads'; it has {', '.join(config)}")

    def shape(name):
        return official.array(state, name).shape

    fields["vocab_size"], fields["hidden_size"] = shape("bert.embeddings.word_embeddings.weight")
    fields["max_position_embeddings"] = shape("bert.embeddings.position_embeddings.weight")[0]
    fields["type_vocab_size"] = shape("bert.embeddings.token_type_embeddings.weight")[0]
    fields["intermediate_size"] = shape("bert.encoder.layer.0.intermediate.dense.weight")[0]
    layers = {int(name.split(".")[3]) for name in state if name.startswith("bert.encoder.layer.")}
    if layers != set(range(len(layers))):
        raise ValueError(f"state_dict has layers {sorted(layers)}; none may be missing")
    return CAMTLConfig(num_hidden_layers=len(layers), **fields, **tasks)


def from_official(config: dict, state_dict: dict, *, backend="auto") -> CAMTL:
    """A CA-MTL with the parameters of the released code, in the dtype of `state_dict`; see `read_official`."""
    sizes, weights = read_official(config, state_dict)
    model = CAMTL(dataclasses.replace(sizes, backend=backend), dtype=official.common_dtype(weights))
    load_weights(model, weights, "state_dict")
    return model


def read_official(config: dict, state_dict: dict) -> tuple:
    """(CAMTLConfig, state dict of `CAMTL`) from the released model.

    Sizes, the variant and the classes of each task are read off the tensors.

    Args:
        config: the released config.json (a BertConfig), of which `num_attention_heads`, `layer_norm_eps`, `pad_token_id` and
            the two dropouts are read, with `tasks`, their names in the order of training; default "task0", "task1", ...
        state_dict: tensors under the released names.

    Raises ValueError for missing, unknown or misshapen entries, TypeError for what are no dictionaries.
    """
    official.check_mappings(config, state_dict)
    state = dict(state_dict)
    numbers = []
    while f"decoders.{len(numbers)}.model.weight" in state:
        numbers.append(state[f"decoders.{len(numbers)}.model.weight"].shape[0])
    if not numbers:
        raise ValueError("state_dict has no 'decoders.0.model.weight'; it is no CA-MTL")
    sizes = _sizes(
        config,
        state,
        variant="large" if any(name.startswith("bert.encoder.adapter_layer.") for name in state) else "base",
        tasks=config.get("tasks", tuple(f"task{i}" for i in range(len(numbers)))),
        num_labels=tuple(numbers),
        max_seq_length=official.array(state, "bert.encoder.layer.0.attention.self.random_weight_matrix").shape[0],
    )
    weights = {}
    for ours, theirs in official_names(sizes).items():
        found = [official.array(state, name) for name in ((theirs,) if isinstance(theirs, str) else theirs)]
        weights[ours] = found[0] if len(found) == 1 else torch.cat(found)
        for name in (theirs,) if isinstance(theirs, str) else theirs:
            del state[name]
    state.pop("bert.embeddings.position_ids", None)
    if state:
        raise ValueError(f"state_dict has {min(state)!r}, which this CA-MTL does not have")
    return sizes, weights


def from_bert(config: dict, state_dict: dict, *, variant="base", backend="auto", **tasks) -> CAMTL:
    """A CA-MTL that begins with a pretrained BERT: what both have by name is the BERT's, all else is new.

    In the base variant the last layer is new as well, as in the released code.

    Args:
        config, state_dict: a BERT of Hugging Face, with or without heads.
        tasks: `tasks`, `num_labels` and `max_seq_length` of the `CAMTLConfig`.

    Raises ValueError for missing or misshapen entries, TypeError for what are no dictionaries.
    """
    official.check_mappings(config, state_dict)
    prefix = "" if any(name.startswith("bert.") for name in state_dict) else "bert."
    renamed = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    state = {}
    for name, tensor in state_dict.items():
        for old, new in renamed:
            name = name.replace(old, new)
        state[prefix + name] = tensor
    sizes = _sizes(config, state, variant=variant, backend=backend, **tasks)
    model = CAMTL(sizes)
    own = model.state_dict()
    last = f"layers.{sizes.num_hidden_layers - 1}."
    for ours, theirs in official_names(sizes).items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        if any(part in ours for part in ("film.", ".matrix", "task.", "transform.", "bottleneck", "heads.")):
            continue
        if variant == "base" and ours.startswith(last) or ours.startswith("pooler.") and names[0] not in state:
            continue
        found = [official.array(state, name) for name in names]
        own[ours] = (found[0] if len(found) == 1 else torch.cat(found)).to(own[ours].dtype)
    load_weights(model, own, "state_dict")
    return model
