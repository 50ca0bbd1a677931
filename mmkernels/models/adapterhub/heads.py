"""Heads of the library's `*AdapterModel`s, with its names: dropout and linear layers with activations between them."""

import torch
from torch import nn
from torch.nn import functional as F

from ...modules.adapter import ACTIVATIONS


class PredictionHead(nn.Sequential):
    """A head of the library's `*AdapterModel`s, with its names: dropout and linear layers with activations between them.

    Args:
        config: head_config.json's "config": head_type "classification", "multilabel_classification", "tagging",
            "question_answering", "multiple_choice", "image_classification", "masked_lm", "causal_lm" or "seq2seq_lm";
            num_labels or num_choices, layers, activation_function, use_pooler (classification), vocab_size (language models).
        channels, dropout, eps: of the model.
    """

    def __init__(self, config: dict, channels: int, dropout=0.0, eps=1e-12, *, device=None, dtype=None):
        factory = {"device": device, "dtype": dtype}
        config = {**HEADS[config["head_type"]], "label2id": None, **config}
        activation = config["activation_function"]
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation_function is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        if config.get("dropout_prob") is not None:
            dropout = config["dropout_prob"]
        layers = []
        if "vocab_size" in config:
            width = config.get("embedding_size") or channels
            if config["head_type"] != "seq2seq_lm":
                config["embedding_size"] = width
            for number in range(config["layers"] - 1):
                layers.append(nn.Linear(channels if number == 0 else width, width, **factory))
                if activation is not None:
                    layers.append(_Activation(activation))
                if config["layer_norm"]:
                    layers.append(nn.LayerNorm(width, eps=eps, **factory))
            layers.append(nn.Linear(width, config["vocab_size"], bias=config["bias"], **factory))
        else:
            outputs = 1 if "num_choices" in config else config["num_labels"]
            for number in range(config["layers"]):
                layers.append(nn.Dropout(dropout))
                if number < config["layers"] - 1:
                    layers += [nn.Linear(channels, channels, **factory)]
                    layers += [] if activation is None else [_Activation(activation)]
                else:
                    layers.append(nn.Linear(channels, outputs, bias=config.get("bias", True), **factory))
        super().__init__(*layers)
        self.config = config

    @property
    def is_of_rows(self) -> bool:
        """Whether it has one result for a row, not one for each token."""
        return "vocab_size" not in self.config and self.config["head_type"] not in ("tagging", "question_answering")

    def logits(self, hidden, whole=None, pooled=None, invert=None):
        """Logits (B, labels), (B / choices, choices), or (B, T, labels or vocabulary).

        Args:
            hidden: (B, T, C), the last hidden state.
            whole: (B, C), what stands for a row in a head of whole rows; the first token by default.
            pooled: (B, C), the same for heads with use_pooler.
            invert: invertible adapters backwards, in front of the last layer of a language model.
        """
        kind = self.config["head_type"]
        if "vocab_size" in self.config:
            *before, last = self
            for layer in before:
                hidden = layer(hidden)
            return last(hidden if invert is None else invert(hidden))
        if not self.is_of_rows:
            return self(hidden)
        if self.config["use_pooler"] and pooled is None:
            raise ValueError("the head has use_pooler; the model gave no pooler_output")
        whole = pooled if self.config["use_pooler"] else hidden[:, 0] if whole is None else whole
        logits = self(whole)
        return logits.view(-1, self.config["num_choices"]) if kind == "multiple_choice" else logits

    def named_as(self, parts, tensors, prefix) -> dict:
        """Tensors of a head that names its layers `parts`, named as those of this one."""
        own = [name for name, layer in self.named_children() if any(True for _ in layer.parameters())]
        return {
            f"{prefix}{number}.{key.removeprefix(part + '.')}": tensor
            for number, part in zip(own, parts, strict=True)
            for key, tensor in tensors.items()
            if key.rpartition(".")[0] == part
        }

    def loss(self, logits, labels):
        """The usual one of the kind: cross-entropy, squared error (one label), or binary cross-entropy (several at once).

        labels: (B,), (B, labels) for multilabel, (B, T) with -100 for no label, or (B, 2) starts and ends for answers.
        """
        kind = self.config["head_type"]
        if kind == "multilabel_classification" or self.config.get("multilabel"):
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if kind == "question_answering":
            return sum(F.cross_entropy(logits[..., i], labels[:, i]) for i in (0, 1)) / 2
        if kind in ("classification", "image_classification") and self.config["num_labels"] == 1:
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if self.config.get("shift_labels"):
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class _Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name][1](x)


_CLASSIFIER = {"num_labels": 2, "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}
_CLASSIFIER |= {"dropout_prob": None}
_TAGGER = {"num_labels": 2, "layers": 1, "activation_function": "tanh", "dropout_prob": None}
_LM = {"vocab_size": None, "layers": 1, "activation_function": None, "layer_norm": False, "bias": False, "shift_labels": True}
HEADS = {  # head_type -> its options
    "classification": _CLASSIFIER,
    "multilabel_classification": _CLASSIFIER,
    "multiple_choice": {
        "num_choices": 2,
        "layers": 2,
        "activation_function": "tanh",
        "use_pooler": False,
        "dropout_prob": None,
    },
    "image_classification": {**_CLASSIFIER, "layers": 1, "multilabel": False},
    "tagging": _TAGGER,
    "question_answering": _TAGGER,
    "causal_lm": {**_LM, "dropout_prob": None},
    "seq2seq_lm": {**_LM, "shift_labels": False},
    "masked_lm": {**_LM, "layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True, "shift_labels": False},
}

# The own heads of models: end of the class's name -> head_type; names of their layers -> options.
KINDS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "question_answering",
    "ForMultipleChoice": "multiple_choice",
    "ForImageClassification": "image_classification",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",
}
_DEEP = {"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True}
STATIC = {
    ("pre_classifier", "classifier"): {"layers": 2, "activation_function": "relu"},
    ("pooler.dense", "classifier"): {"layers": 2, "activation_function": "gelu"},
    ("classifier.dense", "classifier.out_proj"): {"layers": 2, "activation_function": "tanh"},
    ("classification_head.dense", "classification_head.out_proj"): {"layers": 2, "activation_function": "tanh"},
    ("score",): {"layers": 1, "activation_function": None, "bias": False},
    ("classifier",): {"layers": 1, "activation_function": None},
    ("qa_outputs",): {"layers": 1, "activation_function": None},
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"): _DEEP,
    ("predictions.dense", "predictions.LayerNorm", "predictions.decoder"): {**_DEEP, "activation_function": "gelu_new"},
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"): _DEEP,
    ("vocab_transform", "vocab_layer_norm", "vocab_projector"): _DEEP,
    ("lm_head",): {"layers": 1, "activation_function": None, "layer_norm": False, "bias": False},
}


def read_static(class_name, tensors) -> tuple:
    """(options of a PredictionHead, names of layers) of a model's own head; (None, ()) where none is like it."""
    kind = next((kind for end, kind in KINDS.items() if str(class_name).endswith(end)), None)
    parts = next((parts for parts in STATIC if all(f"{part}.weight" in tensors for part in parts)), None)
    if kind is None or parts is None:
        return None, ()
    options = {"head_type": kind, **STATIC[parts]}
    if "bias" not in HEADS[kind]:
        options.pop("bias", None)
    elif options.get("bias") is False:
        options["bias"] = f"{parts[-1]}.bias" in tensors  # GPT-J has one
    count = tensors[f"{parts[-1]}.weight"].shape[0]
    if "vocab_size" in HEADS[kind]:
        options["vocab_size"] = count
        if kind != "seq2seq_lm":
            options["embedding_size"] = tensors[f"{parts[-1]}.weight"].shape[1]
    elif kind != "multiple_choice":
        options["num_labels"] = count
    if str(class_name).startswith("Electra") and kind == "classification":
        options["activation_function"] = "gelu"
    if "use_pooler" in HEADS[kind]:
        options["use_pooler"] = parts == ("classifier",) and not str(class_name).startswith("ViT")
    return options, parts


def represented(config, output, ids):
    """What heads of a model are given: the hidden states (B, T, C), and the one (B, C) that stands for each row, or None.

    The first token's, but that of the last end-of-sequence token (in `ids` (B, T)) in models with a decoder, that of the last
    token that is no padding in GPT-2, GPT-J and Llama, the mean in BEiT.
    """
    hidden = output.last_hidden_state
    if config.model_type == "beit":
        return hidden, output.pooler_output
    decodes, whole = "encoder_last_hidden_state" in output, None
    causal = config.model_type.startswith("gpt") or config.model_type in ("llama", "mistral", "qwen2")
    if (decodes or causal) and ids is not None and ids.shape[1] == hidden.shape[1]:
        if not decodes:
            counted = torch.ones_like(ids) if config.pad_token_id is None else ids != config.pad_token_id
        else:
            counted = ids == config.eos_token_id
            if not bool(counted.any(1).all()):
                raise ValueError(f"input_ids has rows without the token {config.eos_token_id}, which stands for a row")
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (counted * places).argmax(1).repeat(hidden.shape[0] // max(1, ids.shape[0]))
        whole = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    if decodes and config.model_type in ("t5", "mt5") and config.tie_word_embeddings:
        hidden = hidden * config.d_model**-0.5
    return hidden, whole


def shift_right(ids, config):
    """What a decoder is given to make `ids` (B, T): the same one token later."""
    shifted = ids.roll(1, -1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, config.pad_token_id)
