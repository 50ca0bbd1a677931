"""No number without a green check: output and gradients of every candidate against float64."""

import statistics

import torch

import mmkernels
from mmkernels import testing

from . import adapted, adapters, perceiver, text
from .baselines import Candidate
from .registry import Inputs, Problem

# Largest float64 score tensor that the exact result may keep at a time.
CHUNK_BYTES = 512 * 2**20
# ||actual - exact|| / ||exact|| up to which another library counts as computing the same function.
SAME_FUNCTION = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# From so many gradients on, some of eager's have a small error by luck alone.
MANY_GRADIENTS = 20


class WrongResult(AssertionError):
    """A candidate's output or gradient is out of its error budget."""


def exact(problem: Problem, inputs: Inputs, wanted: tuple) -> testing.Run:
    """Output and gradients in float64 from the op's reference, some queries at a time so that any M fits in memory."""
    if not isinstance(problem, Problem):
        return problem.exact(inputs, wanted)
    op = getattr(mmkernels.ops, problem.op)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
    leaves = {n: tensors[n].requires_grad_() for n in wanted}
    rows_of = {"q", "bias"} if problem.op == "attention" else {"q"}  # arguments with a row for each query
    chunk = max(1, CHUNK_BYTES // (8 * problem.batch * problem.heads * problem.keys))
    outputs = []
    for start in range(0, problem.queries, chunk):
        rows = slice(start, start + chunk)
        part = {n: t[..., rows, :] if n in rows_of else t for n, t in tensors.items()}
        out = op(**part, **inputs.options, backend="reference")
        if wanted:
            # Gradients add up over the chunks: each row of the output depends on its own query alone.
            out.backward(inputs.cotangent[..., rows, :].double())
        outputs.append(out.detach())
    return testing.Run(torch.cat(outputs, -2), {n: t.grad for n, t in leaves.items()})


def errors(problem, candidate: Candidate, inputs: Inputs, wanted: tuple, actual, right, plain) -> dict:
    """`check`, but for floors, which are right where they solve their own problem, and for whole text models: their tokens are
    no numbers, and they have many ReLUs on the way."""
    solved = candidate.solves or problem
    if solved is not problem:
        right = exact(solved, inputs, wanted)
    if isinstance(solved, perceiver.PerceiverIO) and "convert" in candidate.name:
        plain = None  # the library makes positions in float32: the same function, by other roundings
    if not isinstance(solved, text.Text):
        return check(candidate, actual, right, plain, kinks=isinstance(solved, adapters.Adapters | adapted.Adapted))
    if solved.beams:
        found = {"tokens": text.lost_by_tokens(solved, inputs, actual.output, right.output)}
    else:
        found = {"output": relative_error(actual.output[0], right.output[0])}
        found |= {f"gradient of {n}": relative_error(g, right.gradients[n]) for n, g in actual.gradients.items()}
        if actual.gradients:
            gradients = [error for what, error in found.items() if what.startswith("gradient")]
            found["typical gradient"] = statistics.median(gradients)
    for what, error in found.items():
        allowed = text.allowed_error(solved, what, SAME_FUNCTION[solved.torch_dtype])
        if not error <= allowed:
            raise WrongResult(f"{what}: relative error {error:.2e}, allowed is {allowed:.1e}")
    return found


def run(candidate: Candidate, inputs: Inputs, wanted: tuple) -> testing.Run:
    """One call of a candidate, as it is timed."""
    with torch.set_grad_enabled(bool(wanted)):
        return testing.run(candidate.function, inputs.tensors, wanted, inputs.cotangent, **inputs.options)


def eager(problem, candidate: Candidate, inputs: Inputs, wanted: tuple, right: testing.Run, first=None) -> testing.Run:
    """Eager's run, whose errors set the budgets of `check`; `first` is one that was made already.

    For a whole network each tensor is the one farthest from `right` of three runs: one at the inputs, two where every number
    is moved to a neighbour, which is what float inputs are uncertain by. A single run carries one set of rounding errors
    through all layers, and among a hundred gradients there are some that they hardly touch. (Text models have no budgets.)
    """
    runs = [first or run(candidate, inputs, wanted)]
    if len(wanted) >= MANY_GRADIENTS and not isinstance(problem, text.Text):
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            moved = inputs._replace(tensors={n: testing.neighbour(t, generator) for n, t in inputs.tensors.items()})
            runs.append(run(candidate, moved, wanted))

    outputs = [[r.output] if isinstance(r.output, torch.Tensor) else r.output for r in (right, *runs)]
    output = [testing.farthest(*each) for each in zip(*outputs, strict=True)]
    gradients = {n: testing.farthest(right.gradients[n], *(r.gradients[n] for r in runs)) for n in runs[0].gradients}
    return testing.Run(output[0] if isinstance(right.output, torch.Tensor) else output, gradients)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; infinite when it is not finite."""
    error = float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def check(
    candidate: Candidate, actual: testing.Run, exact: testing.Run, plain: testing.Run | None, kinks: bool = False
) -> dict:
    """Errors by tensor name; raises WrongResult when one is out of its budget.

    Ours stay within the budget that the tests use (`mmkernels.testing.assert_within_budget`, set by eager in the same
    dtype, `plain`); other libraries, and ours where eager cannot run, have to compute the same function. `kinks`: their
    gradients may differ by the ReLUs that rounding turns on and off.
    """
    outputs = [None if run is None else run.output for run in (actual, exact, plain)]
    if isinstance(actual.output, torch.Tensor):
        named = {"output": tuple(outputs)}
    else:
        each = zip(*(out or [None] * len(exact.output) for out in outputs), strict=True)
        named = {f"output {i}": triple for i, triple in enumerate(each)}
    for name, gradient in actual.gradients.items():
        named[f"gradient of {name}"] = (gradient, exact.gradients[name], plain and plain.gradients[name])
    typical = 0.0
    if plain is not None:  # eager's usual error, as in `testing.check_op`
        typical = statistics.median(relative_error(theirs, right) for _, right, theirs in named.values())
    errors = {}
    for what, (ours, right, theirs) in named.items():
        errors[what] = relative_error(ours, right)
        if candidate.kind == "mmkernels" and plain is not None:
            try:
                testing.assert_within_budget(ours, right, theirs, what, 2.0 if what.startswith("output") else 3.0, typical)
            except AssertionError as error:
                raise WrongResult(str(error)) from None
            continue
        allowed = SAME_FUNCTION[ours.dtype]
        if theirs is not None:  # deep in a network most of a gradient may cancel, for eager as well
            allowed = max(allowed, 3.0 * relative_error(theirs, right))
        if kinks and what.startswith("gradient"):
            allowed = max(allowed, text.one_kink(ours.dtype))
        if not errors[what] <= allowed:
            raise WrongResult(f"{what}: relative error {errors[what]:.2e}, allowed is {allowed:.1e}")
    return errors
