"""The metrics of GLUE and SuperGLUE, of generated texts: scikit-learn's and SciPy's, and answers as SQuAD compares them.

A text that is no label of its task, or no number, is wrong. All values are shares of 1.
"""

import collections
import math
import re
import string

from ..models.registry import require

DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose your".split()
)


def evaluate(metrics: tuple, texts: list, examples: list) -> dict:
    """{metric: value} of generated texts, one for each example."""
    found = {}
    for metric in metrics:
        found |= METRICS[metric](texts, examples)
    return found


def accuracy(texts, examples):
    truth = [example.truth for example in examples]
    return {"accuracy": float(_sklearn().accuracy_score(truth, texts))}


def accuracy_by_group(texts, examples):
    """MNLI: matched and mismatched."""
    return {f"accuracy_{name}": accuracy(*part)["accuracy"] for name, part in _groups(texts, examples).items()}


def matthews(texts, examples):
    truth = [example.truth for example in examples]
    return {"matthews": float(_sklearn().matthews_corrcoef(truth, texts))}


def f1(texts, examples):
    """Of the second label; what is no label counts as the opposite of the truth, as in T5."""
    labels = POSITIVE | NEGATIVE
    truth = [example.truth in POSITIVE for example in examples]
    said = [text in POSITIVE if text in labels else not right for text, right in zip(texts, truth, strict=True)]
    return {"f1": float(_sklearn().f1_score(truth, said, zero_division=0.0))}


POSITIVE = frozenset(("equivalent", "duplicate", "True"))
NEGATIVE = frozenset(("not_equivalent", "not_duplicate", "False"))


def macro_f1(texts, examples):
    """CB: the mean over its three labels."""
    truth = [example.truth for example in examples]
    labels = ("entailment", "contradiction", "neutral")
    return {"macro_f1": float(_sklearn().f1_score(truth, texts, labels=labels, average="macro", zero_division=0.0))}


def exact_match_by_group(texts, examples):
    """MultiRC: the share of questions of which every answer is judged right."""
    groups = _groups(texts, examples).values()
    right = [all(text == example.truth for text, example in zip(*part, strict=True)) for part in groups]
    return {"exact_match": sum(right) / len(right)}


def pearson(texts, examples):
    return {"pearson": _correlation("pearsonr", texts, examples)}


def spearman(texts, examples):
    return {"spearman": _correlation("spearmanr", texts, examples)}


def _correlation(name, texts, examples):
    """Of the scores, which are not rounded here; a text that is no number is -1. Zero where either side is constant."""
    said = [_number(text) for text in texts]
    truth = [example.truth for example in examples]
    if len(set(said)) < 2 or len(set(truth)) < 2:
        return 0.0
    return float(getattr(require("scipy.stats", "text"), name)(truth, said).statistic)


def _number(text):
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def answer_f1(texts, examples):
    return {"f1": _best_answer(_token_f1, texts, examples)}


def answer_exact_match(texts, examples):
    return {"exact_match": _best_answer(lambda said, answer: float(said == answer), texts, examples)}


def _best_answer(score, texts, examples):
    """The mean of the best score against any of an example's answers."""
    best = [
        max(score(normalized(text), normalized(answer)) for answer in example.truth)
        for text, example in zip(texts, examples, strict=True)
    ]
    return sum(best) / len(best)


def normalized(text: str) -> str:
    """As SQuAD's evaluation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(said, answer):
    said, answer = said.split(), answer.split()
    common = sum((collections.Counter(said) & collections.Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def referent_accuracy(texts, examples):
    """WSC and WNLI: whether the generated noun is the candidate, as it should be or should not be."""
    said = [same_noun(text, example.truth[0]) for text, example in zip(texts, examples, strict=True)]
    return {"accuracy": float(_sklearn().accuracy_score([example.truth[1] for example in examples], said))}


def same_noun(said: str, candidate: str) -> bool:
    """Whether the words of one are among those of the other, without case and determiners; "Bob" is not "Bob's hat"."""

    def words(text):
        return " ".join(word for word in text.strip().lower().split(" ") if word not in DETERMINERS)

    said, candidate = words(said), words(candidate)
    if ("'" in said) != ("'" in candidate):
        return False
    said, candidate = set(said.split(" ")), set(candidate.split(" "))
    return said <= candidate or candidate <= said


def _groups(texts, examples):
    groups = {}
    for text, example in zip(texts, examples, strict=True):
        part = groups.setdefault(example.group, ([], []))
        part[0].append(text)
        part[1].append(example)
    return groups


def _sklearn():
    return require("sklearn.metrics", "train")


METRICS = {
    function.__name__: function
    for function in (
        accuracy,
        accuracy_by_group,
        matthews,
        f1,
        macro_f1,
        exact_match_by_group,
        pearson,
        spearman,
        answer_f1,
        answer_exact_match,
        referent_accuracy,
    )
}
