"""Multi-task uncertainty sampling (CA-MTL, Pilault et al. 2021, section 2.5): train on what the model is least sure of.

    H = (- sum p ln p) / (ln C + 1e-5)             of a row's C classes: 0 to almost 1
    m_t = mean H over the candidates of task t     m* = max m_t
    U = H m_t / m*                                 the rows with the highest U are the batch

This is the released code, which multiplies by m_t where the paper divides. A regression has one class, and so H = 0: with
`stand_in` its rows take the scores of another task's.
"""

import torch

EPSILON = 1e-5


def normalized_entropy(logits, num_labels) -> torch.Tensor:
    """H (B,) of logits (B, K), which are -inf behind a row's classes, `num_labels` (B,) of them."""
    entropy = torch.special.entr(torch.softmax(logits.float(), 1)).sum(1)
    return entropy / (num_labels.to(entropy.dtype).log() + EPSILON)


def task_means(entropy, task_id) -> torch.Tensor:
    """m_t of each row's task, (B,)."""
    same = (task_id[:, None] == task_id).to(entropy.dtype)
    return (same * entropy).sum(1) / same.sum(1)


def scores(entropy, task_id, stand_in=None) -> torch.Tensor:
    """U (B,). `stand_in` is (task, another): the first k of the one take the scores of the first k of the other, in order."""
    means = task_means(entropy, task_id)
    largest = means.amax()
    found = torch.where(largest > 0.0, entropy * (means / largest), 0.0)
    if stand_in is not None:
        to, source = ((task_id == task).nonzero()[:, 0] for task in stand_in)
        count = min(len(to), len(source))
        found[to[:count]] = found[source[:count]]
    return found


def select(logits, task_id, num_labels, batch_size: int, stand_in=None) -> torch.Tensor:
    """The numbers of the `batch_size` rows with the highest scores, the highest first; arguments as above."""
    found = scores(normalized_entropy(logits, num_labels), task_id, stand_in)
    return found.topk(min(batch_size, len(found))).indices
