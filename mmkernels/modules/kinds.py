"""Modules from plain dicts, as configs have them in JSON: their arguments, and their kind where there are several."""

import inspect


def build(name: str, kinds: dict, spec: dict, *args, **factory):
    """The module that `spec`, {"kind": one of `kinds`, **arguments}, describes; see `make`."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind not in kinds:
        raise ValueError(f"{name} is {spec!r}; it must be a dict with a 'kind' of {', '.join(map(repr, kinds))}")
    return make(
        f"{name} {kind!r}", kinds[kind], {key: value for key, value in spec.items() if key != "kind"}, *args, **factory
    )


def make(name: str, module, options: dict, *args, **factory):
    """`module` with the arguments `options`; `args` and `factory` come from elsewhere, and are no options.

    Raises ValueError that says `name`, what it was and what is allowed.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{name} is {options!r}; it must be a dict")
    parameters = list(inspect.signature(module).parameters.values())[len(args) :]
    known = [p for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in ("device", "dtype", *factory)]
    names = [p.name for p in known]
    if unknown := sorted(set(options) - set(names)):
        raise ValueError(f"{name} has an unknown {unknown[0]!r}; allowed are {', '.join(names) or 'no arguments'}")
    if missing := [p.name for p in known if p.default is p.empty and p.name not in options]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    try:
        return module(*args, **options, **factory)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
