"""What is active, as an expression over the names of adapters: `Stack("en", Parallel("ner", "pos"))`.

    Stack        one after the other                Fuse        attention over the outputs of all (AdapterFusion)
    Parallel     the batch once for each            Average     weighted mean of the outputs
    BatchSplit   consecutive rows of the batch      MultiTask   the row's task, given with the batch as `task_ids`
    Split        consecutive tokens

Blocks hold names only; a `Place` computes them.
"""

import dataclasses
import math
import threading

import torch

from ..ops._shared.arguments import check_numbers
from .adapter import fuse_bottlenecks

BLOCKS = {}  # name -> class
# What a block may hold beside names of adapters, as in the library `adapters`. A Stack with blocks in it stands at the top.
ALLOWED = {
    "Stack": ("Fuse", "Split", "Parallel", "BatchSplit", "Average", "MultiTask"),
    "Fuse": ("Stack",),
    "Split": ("Split", "Stack", "BatchSplit", "Average"),
    "Parallel": ("Stack", "BatchSplit", "Average"),
    "BatchSplit": ("Stack", "Split", "BatchSplit", "Average"),
    "Average": ("Stack", "Split", "BatchSplit"),
    "MultiTask": ("Stack", "Average", "Fuse"),
}


class Block:
    """A composition of `children`: names of adapters and other blocks.

    Raises TypeError for children that are neither, ValueError for none and for blocks that may not stand there.
    """

    def __init_subclass__(cls):
        BLOCKS[cls.__name__] = cls

    def __init__(self, *children):
        kind = type(self).__name__
        if not children:
            raise ValueError(f"{kind} has no children; it must have at least one name of an adapter or block")
        for child in children:
            if not isinstance(child, (str, Block)):
                raise TypeError(f"{kind} has {child!r}, a {type(child).__name__}; it may have names of adapters and blocks")
            if isinstance(child, str):
                continue
            if type(child).__name__ not in ALLOWED[kind]:
                allowed = ", ".join(ALLOWED[kind])
                raise ValueError(f"{child} cannot stand in a {kind}; allowed in it are names of adapters and {allowed}")
            if isinstance(child, Stack) and any(isinstance(inner, Block) for inner in child.children):
                raise ValueError(f"{child} cannot stand in a {kind}: a Stack that holds blocks must be the outermost one")
        self.children = children

    def paths(self) -> list:
        """Tuples of names, one for each way through the blocks, in order of appearance."""
        return [path for child in self.children for path in paths(child)]

    def names(self) -> list:
        """Every name once, in order of appearance."""
        return list(dict.fromkeys(name for path in self.paths() for name in path))

    def options(self) -> dict:
        """The keyword arguments that make another one of the same children equal."""
        return {}

    def to_dict(self) -> dict:
        """What adapter_setup.json has."""
        children = [c.to_dict() if isinstance(c, Block) else {"type": "single", "children": [c]} for c in self.children]
        kwargs = {"kwargs": self.options()} if self.options() else {}
        return {"type": type(self).__name__, "children": children, **kwargs}

    def __eq__(self, other):
        return type(self) is type(other) and (self.children, self.options()) == (other.children, other.options())

    __hash__ = None

    def __repr__(self):
        options = "".join(f", {name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({', '.join(map(repr, self.children))}{options})"


class Stack(Block):
    """One after the other: each gets what the one before it gave. What an adapter's place lacks is passed over."""

    def paths(self):
        result = [()]
        for child in self.children:
            result = [head + tail for head in result for tail in paths(child)]
        return result


class Parallel(Block):
    """Everybody on a batch of its own: rows i B ... (i + 1) B - 1 of the result belong to child i.

    The batch is repeated where the first adapter is, and the rest of the model runs on all of it.
    """


class Split(Block):
    """Consecutive tokens: the first splits[0] of them to the first child, and so on; `splits` must add up to their number."""

    def __init__(self, *children, splits):
        super().__init__(*children)
        self.splits = _sizes("splits", splits, len(children))

    def options(self):
        return {"splits": self.splits}


class BatchSplit(Block):
    """Consecutive rows: the first batch_sizes[0] of the batch to the first child, and so on; an int means that many each."""

    def __init__(self, *children, batch_sizes):
        super().__init__(*children)
        self.batch_sizes = _sizes("batch_sizes", batch_sizes, len(children))

    def options(self):
        return {"batch_sizes": self.batch_sizes}


class MultiTask(Block):
    """Each row to the child of its task: `task_ids`, numbers of children or names, in any order, come with the batch."""


class Fuse(Block):
    """AdapterFusion of the children; `name` is that of the fusion, by default the last names of the children with commas."""

    def __init__(self, *children, name=None):
        super().__init__(*children)
        self.given_name = name
        self.name = name or ",".join(paths(child)[0][-1] for child in children)

    def options(self):
        return {"name": self.given_name} if self.given_name else {}


class Average(Block):
    """sum_n w_n y_n with weights that are divided by their sum, or as given with normalize_weights=False; default equal.

    (The library `adapters` divides this by the number of children once more.)
    """

    def __init__(self, *children, weights=None, normalize_weights=True):
        super().__init__(*children)
        if weights is None:
            weights, normalize_weights = [1.0] * len(children), True
        weights = [float(weight) for weight in weights]
        if len(weights) != len(children):
            raise ValueError(f"weights has {len(weights)} numbers; there are {len(children)} children")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights is {weights}; they must be finite")
        if normalize_weights:
            total = sum(weights)
            if total == 0:
                raise ValueError(f"weights is {weights}; with normalize_weights their sum must not be 0")
            weights = [weight / total for weight in weights]
        self.weights = weights

    def options(self):
        return {"weights": self.weights, "normalize_weights": False}

    def to_dict(self):  # the library's file has the weights alone, already divided
        return {**super().to_dict(), "kwargs": {"weights": self.weights}}


def parse(setup) -> Block | None:
    """A block of what activates adapters: a name is a Stack of it, None is nothing."""
    if setup is None or isinstance(setup, Block):
        return setup
    if isinstance(setup, str):
        return Stack(setup)
    raise TypeError(f"setup is {setup!r}, a {type(setup).__name__}; it must be the name of an adapter, a block or None")


def parse_some(setup) -> Block:
    """As `parse`, of something."""
    if setup is None:
        raise ValueError("setup is None; it must be the name of an adapter or a block")
    return parse(setup)


def from_dict(content) -> Block:
    """The block of `Block.to_dict`; raises ValueError for anything else."""
    try:
        if content["type"] not in BLOCKS:
            raise ValueError(f"block {content['type']!r} is unknown; known are {', '.join(BLOCKS)}")
        children = [c["children"][0] if c["type"] == "single" else from_dict(c) for c in content["children"]]
        kwargs = dict(content.get("kwargs") or {})
        if content["type"] == "Average":
            kwargs.setdefault("normalize_weights", False)
        return BLOCKS[content["type"]](*children, **kwargs)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{content!r} is no composition of adapters: {error!r}") from error


def paths(child) -> list:
    return [(child,)] if isinstance(child, str) else child.paths()


def fuses(child) -> list:
    """Every Fuse in a composition."""
    if isinstance(child, str):
        return []
    return ([child] if isinstance(child, Fuse) else []) + [fuse for inner in child.children for fuse in fuses(inner)]


def _sizes(name, sizes, count):
    sizes = [sizes] * count if isinstance(sizes, int) else list(sizes)
    if len(sizes) != count or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{name} is {sizes}; it must be an integer, or {count} of them, one for each child, none negative")
    return sizes


# --- Computing them ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pass:
    """A forward pass of a model.

    task_ids: numbers (B,), or names, of the children of a MultiTask.
    beside: the pass is of `generate`, which repeats rows for its beams: all of a row, then those of the next.
    batch: the number of rows before Parallel repeated them, once it has.
    ahead: the rows were repeated before the model began.
    depth: how many of the model and its parts are being called, one inside the other.
    """

    task_ids: object = None
    beside: bool = False
    batch: int | None = None
    ahead: bool = False
    depth: int = 0


@dataclasses.dataclass
class Activation:
    """What is active in a model; all its places share one. Each thread has a forward pass of its own.

    compat: None, or "adapters": as the library `adapters` 1.3.0 computes, which differs where it is wrong: with
        original_ln_before the children of Parallel, BatchSplit, Split, Average, MultiTask and Fuse pass LN(h + r) again when
        they are Stacks, and always under MultiTask; Average divides by the number of children once more; a parallel adapter
        in a Stack replaces what the others gave; of the invertible adapters only that of the very first adapter is used.
    passes: of the threads in which the model runs.
    last: the pass that began last, for what computes layers again once it is over, as checkpointing does in a backward.
    """

    setup: Block | None = None
    skip_layers: frozenset = frozenset()
    compat: str | None = None
    passes: dict = dataclasses.field(default_factory=dict)
    last: Pass = dataclasses.field(default_factory=Pass)

    @property
    def running(self) -> Pass:
        """The pass of this thread."""
        return self.passes.get(_thread(), self.last)

    def enter(self, task_ids=None, **options) -> Pass:
        """The model or a part of it is called: a forward pass begins, unless this is a part of one."""
        thread = _thread()
        now = self.passes.get(thread)
        if now is None:
            now = self.passes[thread] = self.last = Pass(task_ids, **options)
        elif task_ids is not None:
            now.task_ids, now.batch = task_ids, None
        now.depth += 1
        return now

    def leave(self) -> None:
        """The call is over, by an error or not."""
        now = self.running
        now.depth -= 1
        if now.depth == 0:
            self.passes.pop(_thread(), None)

    def repeated(self, block, *rows):
        """Every row once for each child of a Parallel, unless the model runs on all of them already."""
        now, count, size = self.running, len(block.children), rows[0].shape[0]
        if not now.ahead and (now.batch is None or size == now.batch):  # a decoder begins with the batch again
            now.batch = size
            return [t.repeat((count,) + (1,) * (t.dim() - 1)) for t in rows]
        if size % count or (not now.ahead and size != count * now.batch):
            needed = "as many" if now.ahead else now.batch
            raise ValueError(f"the batch has {size} rows; {block} needs {needed} of each child")
        return list(rows)

    def tasks(self, block, rows, device):
        """The numbers (rows,) of the children that the tasks of the batch mean."""
        now = self.running
        ids = now.task_ids
        if ids is None:
            raise ValueError(f"task_ids is None; {block} needs the task of each row")
        if not isinstance(ids, (torch.Tensor, list, tuple)):
            raise TypeError(f"task_ids is a {type(ids).__name__}; it must be an int64 tensor or a list of numbers or names")
        if not isinstance(ids, torch.Tensor):
            known = {
                name: number
                for number, child in enumerate(block.children)
                for name in (child, number)
                if isinstance(name, (str, int))
            }
            unknown = [task for task in ids if not isinstance(task, (str, int)) or isinstance(task, bool) or task not in known]
            if unknown:
                raise ValueError(f"task_ids has {unknown[0]!r}; {block} has {', '.join(map(str, block.children))}")
            ids = torch.tensor([known[task] for task in ids], dtype=torch.int64)
        # of the batch, where a Parallel has repeated its rows, or of what `generate` was given
        whole = ids.dim() == 1 and (ids.shape[0] == rows or ids.shape[0] == now.batch or now.beside)
        if not whole or rows % max(1, ids.shape[0]):
            raise ValueError(f"task_ids has shape {tuple(ids.shape)}; it must be ({rows},), a task for each row")
        check_numbers("task_ids", ids, len(block.children), ids.device)
        times, ids = rows // max(1, ids.shape[0]), ids.to(device, torch.int64)
        return ids.repeat_interleave(times) if now.beside else ids.repeat(times)


class Place:
    """What happens at one place of a model, whose adapters are `owner.adapters` (an AdapterBank) and whose fusions
    `owner.adapter_fusion_layer` (a ModuleDict). No module: the owner's parameters are all there is.
    """

    def __init__(self, owner, layer: int, active: Activation, channels: int | None = None):
        self.owner, self.layer, self.active, self.channels = owner, layer, active, channels

    def __call__(self, hidden, residual, norm=None):
        """h, r, LN -> the sub-layer's output, with more rows where a Parallel is reached first."""
        active = self.active
        setup = active.setup
        if setup is None or self.layer in active.skip_layers:
            return _ended(hidden, residual, norm)
        name = setup.children[0] if type(setup) is Stack and len(setup.children) == 1 else None
        if isinstance(name, str):  # as it mostly is: a small batch waits for what is looked at here
            adapters = self.owner.adapters
            out = adapters[name](hidden, residual, norm) if name in adapters else _ended(hidden, residual, norm)
        elif not self._has(setup):
            return _ended(hidden, residual, norm)
        elif active.compat == "adapters" and not self._is_plain_stack(setup):
            out = self._as_library(setup, hidden, residual, norm)
        else:
            out = self._run(setup, hidden, residual, norm, True)[0]
        if out.dtype == hidden.dtype == residual.dtype:
            return out
        # under autocast h has its dtype and r has not: the sum is r's, as in the model without adapters
        return out.to(torch.promote_types(hidden.dtype, residual.dtype))

    def _is_plain_stack(self, setup):
        """What the library computes as it should, so that it need not be computed its way."""
        if not isinstance(setup, Stack) or not all(isinstance(child, str) for child in setup.children):
            return False
        configs = [self.owner.adapters[name].config for name in setup.children if name in self.owner.adapters]
        return len(configs) == 1 or not any(config.is_parallel for config in configs)

    def _has(self, child) -> bool:
        """Whether a part of the composition has an adapter here."""
        return any(name in self.owner.adapters for path in paths(child) for name in path)

    def _run(self, node, hidden, residual, norm, last):
        """(y, residual) of a composition whose result is the place's, if it is the `last`, or goes on to another one."""
        bank = self.owner.adapters
        if not self._has(node):
            return (_ended(hidden, residual, norm) if last else hidden), residual
        if isinstance(node, str):
            return bank[node](hidden, residual, norm, last=last), residual
        if isinstance(node, Stack):
            children = [child for child in node.children if self._has(child)]
            for child in children:
                hidden, residual = self._run(child, hidden, residual, norm, last and child is children[-1])
            return hidden, residual
        if isinstance(node, Fuse):
            return self._fuse(node, hidden, residual, norm, last), residual
        if isinstance(node, Average):
            children = [(w, c) for w, c in zip(node.weights, node.children, strict=True)]
            total = sum(w * self._run(child, hidden, residual, norm, False)[0] for w, child in children)
            final = next(name for path in reversed(node.paths()) for name in reversed(path) if name in bank)
            return (bank[final].after(total, residual, norm) if last else total), residual
        if isinstance(node, Parallel):
            hidden, residual = self.active.repeated(node, hidden, residual)
        steps = self._steps(node)
        if steps is not None:
            child = self._children(node, hidden)
            for number, names in enumerate(steps):
                present = [name for name in names if name is not None]
                index = child
                if len(set(present)) < len(names):
                    places = numbers_of(tuple(present.index(n) if n in present else -1 for n in names), hidden.device)
                    inside = child.clamp(0, len(names) - 1)
                    # a wrong number stays wrong on a GPU, where nobody looks at them: the op makes NaN of it
                    index = torch.where(child == inside, places[inside], len(names))
                hidden = bank(hidden, residual, norm, index=index, names=present, last=last and number == len(steps) - 1)
            return hidden, residual
        return self._apart(node, hidden, residual, norm, last), residual

    def _children(self, node, hidden):
        """The number of the child that each row (B,), or token (B, T), belongs to."""
        if isinstance(node, MultiTask):
            return self.active.tasks(node, hidden.shape[0], hidden.device)
        axis, sizes = parts(node, hidden)
        numbers = numbers_of(tuple(n for n, size in enumerate(sizes) for _ in range(size)), hidden.device)
        return numbers if axis == 0 else numbers.expand(hidden.shape[:2])

    def _steps(self, node):
        """The adapters of the children, first ones, second ones and so on, where each step can be one call; else None.

        Shorter Stacks come late, so that everybody ends in the last step.
        """
        if not all(isinstance(child, str) or isinstance(child, Stack) for child in node.children):
            return None
        bank = self.owner.adapters
        if bank.backend == "eager":
            return None
        ways = [[name for name in paths(child)[0] if name in bank] for child in node.children]
        length = max(map(len, ways))
        ways = [[None] * (length - len(way)) + way for way in ways]
        steps = [list(names) for names in zip(*ways, strict=True)]
        for number, names in enumerate(steps):
            present = [name for name in names if name is not None]
            absent_at_the_end = number == length - 1 and len(present) < len(names)
            if not bank.alike(present) or (absent_at_the_end and not bank[present[0]].config.original_ln_after):
                return None
            if isinstance(node, Split) and bank[present[0]].config.use_gating:
                return None
        return steps

    def _apart(self, node, hidden, residual, norm, last):
        """Children that differ in more than numbers, each on its own rows."""
        if isinstance(node, MultiTask):
            child, result = self._children(node, hidden), None
            for number, inner in enumerate(node.children):
                y, _ = self._run(inner, hidden, residual, norm, last)
                result = y if result is None else torch.where((child == number)[:, None, None], y, result)
            return result
        axis, sizes = parts(node, hidden)
        pieces = zip(node.children, hidden.split(sizes, axis), residual.split(sizes, axis), strict=True)
        return torch.cat([self._run(child, h, r, norm, last)[0] for child, h, r in pieces], axis)

    def _fuse(self, node, hidden, residual, norm, last):
        bank, fusion = self.owner.adapters, self._fusion(node)
        children = [child for child in node.children if self._has(child)]
        final = bank[next(name for name in reversed(paths(children[-1])[0]) if name in bank)]
        x, res = final.before(hidden, residual, norm)
        query = hidden if fusion.config.query_before_ln and not final.config.is_parallel else x
        y, res = None, None if final.config.is_parallel else res
        if all(isinstance(child, str) for child in children):
            y = fuse_bottlenecks(fusion, [bank[child] for child in children], query, x, res)
        if y is None:
            outputs = []
            for child in children:
                *before, end = (name for name in paths(child)[0] if name in bank)
                h = hidden
                for name in before:
                    h = bank[name](h, residual, norm, last=False)
                outputs.append(bank[end].up(bank[end].before(h, residual, norm)[0]))
            y = fusion(query, outputs, res)
        if final.config.is_parallel:
            y = y + hidden
        return final.after(y, residual, norm) if last else y

    def _fusion(self, node):
        if node.name not in self.owner.adapter_fusion_layer:
            known = ", ".join(map(repr, self.owner.adapter_fusion_layer)) or "none"
            raise ValueError(f"{node} needs the fusion {node.name!r}; here are {known}")
        return self.owner.adapter_fusion_layer[node.name]

    # --- As the library does it: a state goes through the blocks, and one last step ends it

    def _as_library(self, setup, hidden, residual, norm):
        state = self._library(setup, _State(hidden, residual, residual), norm)
        final = self.owner.adapters[state.last]
        y = state.hidden + hidden if final.config.is_parallel else state.hidden
        return final.after(y, state.residual, norm)

    def _before(self, name, state, norm):
        if name not in self.owner.adapters:
            raise KeyError(name)
        x, res = self.owner.adapters[name].before(state.hidden, state.residual, norm)
        return dataclasses.replace(state, hidden=x, around=res)

    def _single(self, name, state):
        adapter = self.owner.adapters[name]
        return dataclasses.replace(state, hidden=adapter.inner(state.hidden, state.around), entered=state.hidden, last=name)

    def _library(self, node, state, norm):
        bank = self.owner.adapters
        if isinstance(node, Stack):
            for child in node.children:
                if not isinstance(child, str):
                    state = self._library(child, state, norm)
                elif child in bank:
                    state = self._single(child, self._before(child, state, norm))
            return state
        first, last = paths(node)[0][0], paths(node)[-1][-1]
        if isinstance(node, Fuse):
            fusion, final = self._fusion(node), bank[last]
            hidden, state = state.hidden, self._before(last, state, norm)
            query = hidden if fusion.config.query_before_ln and not final.config.is_parallel else state.hidden
            children = [child for child in node.children if not isinstance(child, str) or child in bank]
            y = None
            if all(isinstance(child, str) for child in children):
                y = fuse_bottlenecks(fusion, [bank[child] for child in children], query, state.hidden, state.around)
            if y is None:
                states = [self._child(child, state, norm) for child in children]
                y = fusion(query, [bank[s.last].up(s.entered) for s in states], state.around)
            return dataclasses.replace(state, hidden=y, last=last)
        if isinstance(node, Parallel):
            rows = self.active.repeated(node, state.hidden, state.residual, state.around)
            state = dataclasses.replace(state, hidden=rows[0], residual=rows[1], around=rows[2])
        state = self._before(first, state, norm)
        if isinstance(node, Average):
            states = [self._child(c, state, norm) for c in node.children if not isinstance(c, str) or c in bank]
            weights = torch.tensor(node.weights, device=state.hidden.device)[:, None, None, None]
            y = (torch.stack([s.hidden for s in states]) * weights).mean(0).to(state.hidden.dtype)
            return dataclasses.replace(state, hidden=y, last=states[-1].last)
        if isinstance(node, MultiTask):  # its BatchSplit repeats the step
            state = self._before(first, state, norm)
        plain = all(isinstance(child, str) and child in bank for child in node.children) and bank.alike(node.children)
        if plain and bank.backend != "eager" and not (isinstance(node, Split) and bank[first].config.use_gating):
            index = self._children(node, state.hidden)
            y = bank.inner(state.hidden, state.around, index=index, names=node.children)
            return dataclasses.replace(state, hidden=y, last=last)
        if isinstance(node, MultiTask):
            tasks = self._children(node, state.hidden)
            order, back = tasks.argsort(), tasks.argsort().argsort()
            sizes = torch.bincount(tasks, minlength=len(node.children)).tolist()
            state, axis = state.map(lambda t: t[order]), 0
        else:
            axis, sizes = parts(node, state.hidden)
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        states = [
            self._child(child, state.map(lambda t, b=begin, s=size: t.narrow(axis, b, s)), norm)
            for child, begin, size in zip(node.children, begins, sizes, strict=True)
        ]
        y = torch.cat([s.hidden for s in states], axis)
        if isinstance(node, MultiTask):
            state, y = state.map(lambda t: t[back]), y[back]
        return dataclasses.replace(state, hidden=y, last=next(s.last for s in reversed(states) if s.last))

    def _child(self, child, state, norm):
        if not isinstance(child, str):
            return self._library(child, state, norm)
        return self._single(child, state) if child in self.owner.adapters else state


@dataclasses.dataclass
class _State:
    """Of the library: h, r, the residual around the adapter, what the last adapter was given, its name."""

    hidden: torch.Tensor
    residual: torch.Tensor
    around: torch.Tensor
    entered: torch.Tensor | None = None
    last: str | None = None

    def map(self, function):
        tensors = {n: function(getattr(self, n)) for n in ("hidden", "residual", "around")}
        return dataclasses.replace(self, **tensors)


def parts(node, hidden):
    """(axis, sizes) of what the children of a BatchSplit, Parallel or Split get of h."""
    if isinstance(node, Parallel):
        return 0, [hidden.shape[0] // len(node.children)] * len(node.children)
    axis, sizes, what = (1, node.splits, "tokens") if isinstance(node, Split) else (0, node.batch_sizes, "rows")
    if sum(sizes) != hidden.shape[axis]:
        raise IndexError(f"{node} is for {sum(sizes)} {what}; the batch has {hidden.shape[axis]}")
    return axis, sizes


def _thread():
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _ended(hidden, residual, norm):
    total = hidden + residual
    return total if norm is None else norm(total)


_TENSORS = {}


def numbers_of(numbers, device):
    """int64 on the device, made once: a copy to a GPU in each place of a model would cost more than the adapters."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if (numbers, device) not in _TENSORS:
        if len(_TENSORS) > 1000:
            _TENSORS.clear()
        with torch.inference_mode(False):
            tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
        if type(tensor) is not torch.Tensor:  # of a tracer
            return tensor
        _TENSORS[numbers, device] = tensor
    return _TENSORS[numbers, device]


def invert(active: Activation, adapters, hidden, inverse=False):
    """The invertible adapters (a mapping of names to `InvertibleAdapter`) of what is active: the first of each path.

    Raises ValueError where the children of a Fuse or Average have different ones.
    """
    if active.setup is None or not any(name in adapters for name in active.setup.names()):
        return hidden
    if active.compat == "adapters":
        first = paths(active.setup)[0][0]
        return adapters[first](hidden, inverse=inverse) if first in adapters else hidden
    return _invert(active, active.setup, adapters, hidden, inverse)


def _invert(active, node, adapters, hidden, inverse):
    firsts = [next((name for name in path if name in adapters), None) for path in paths(node)]
    if len(set(firsts)) == 1:
        return hidden if firsts[0] is None else adapters[firsts[0]](hidden, inverse=inverse)
    if isinstance(node, Stack):
        child = next(c for c in node.children if any(name in adapters for path in paths(c) for name in path))
        return _invert(active, child, adapters, hidden, inverse)
    if isinstance(node, (Fuse, Average)):
        raise ValueError(f"{node} has different invertible adapters: {firsts}; an embedding can go through one of them only")
    if isinstance(node, MultiTask):
        tasks, result = active.tasks(node, hidden.shape[0], hidden.device), hidden
        for number, child in enumerate(node.children):
            y = _invert(active, child, adapters, hidden, inverse)
            result = torch.where((tasks == number)[:, None, None], y, result)
        return result
    if isinstance(node, Parallel):
        hidden = active.repeated(node, hidden)[0]
    axis, sizes = parts(node, hidden)
    pieces = zip(node.children, hidden.split(sizes, axis), strict=True)
    return torch.cat([_invert(active, child, adapters, piece, inverse) for child, piece in pieces], axis)
