"""Which tensors of a network are generated."""

import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .layout import LayoutError, ParameterLayout, closest_names
from .lora import a_module, different_effects, scaling
from .tensor_names import ADAPTER, adapter_configs, adapter_names, match_names, tied_names


def _has_name(module: nn.Module, *words: str) -> bool:
    return any(word in type(module).__name__.lower() for word in words)


# Which modules are of a kind, of any library.
MODULE_KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "norm": lambda module: _has_name(module, "norm") and any(True for _ in module.parameters(recurse=False)),
    "conv": lambda module: isinstance(module, nn.modules.conv._ConvNd),
    "linear": lambda module: isinstance(module, nn.Linear),
}
KINDS = ("all", "bias", *MODULE_KINDS, "attention", "blocks", "head")
_KIND = re.compile(rf"({'|'.join(KINDS)})(?:\[(-?\d{{0,18}})(:?)(-?\d{{0,18}})\])?")
STATISTICS = ("running_mean", "running_var")


def select_layout(
    model: nn.Module,
    select: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    *,
    batch_norm_statistics: bool = False,
) -> ParameterLayout:
    """The layout of what [`select_parameters`] selects, with all other names of its tensors."""
    names = select_parameters(model, select, exclude, batch_norm_statistics=batch_norm_statistics)
    return fit_layout(ParameterLayout.from_state_dict(model.state_dict(), names), model)


def fit_layout(layout: ParameterLayout, model: nn.Module) -> ParameterLayout:
    """
    `layout` with the names that `model` has for its tensors, where they differ by the prefixes of wrappers
    (`torch.compile`, data parallelism, PEFT, transformers' wrapper of timm); and, as aliases, with the names of other
    modules that share a tensor, and with those in the files of PEFT.

    Raises:
        LayoutError: if a tensor of the layout is not in the model, or shares a part of its memory with another one; or
            if the model scales the factors of adapters otherwise.
    """
    state_dict = model.state_dict()
    matched = match_names(layout.names, state_dict)
    names = tuple(matched.get(name, name) for name in layout.names)
    tied, of_adapters = tied_names(model, names), adapter_names(model)
    shared = [[other for other, first in tied.items() if first == name] for name in names]
    aliases = tuple(
        (*others, *itertools.chain.from_iterable(of_adapters.get(n, ()) for n in (name, *others)))
        for name, others in zip(names, shared, strict=True)
    )
    used = {alias.removeprefix(ADAPTER).partition("/")[0] for alias in itertools.chain(*aliases) if ADAPTER in alias}
    adapters = {name: config for name, config in adapter_configs(model).items() if name in used}
    check_adapters(layout, adapters)
    fitted = ParameterLayout(names, layout.shapes, layout.dtypes, aliases, adapters)
    fitted.check_fits(state_dict)
    return fitted


def check_adapters(layout: ParameterLayout, adapters: Mapping[str, dict]) -> None:
    """Raises a `LayoutError` where a model's adapters do other things with the tensors of a layout than its own."""
    modules = {
        module: shape[0] for n, shape in zip(layout.names, layout.shapes, strict=True) if (module := a_module(n))
    }
    for own, theirs in zip(layout.adapters.values(), adapters.values(), strict=False):
        different = different_effects(own, theirs)
        different += [m for m, r in modules.items() if scaling(own, m, r) != scaling(theirs, m, r)][:1]
        if different:
            raise LayoutError(
                f"the model's adapter has another {different[0]} than the adapters of the layout, with which their "
                "factors are other networks; take a base model with an adapter like theirs"
            )


def select_parameters(
    model: nn.Module,
    select: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    *,
    batch_norm_statistics: bool = False,
) -> tuple[str, ...]:
    """
    Names of the parameters of `model` that `select` asks for, in the model's own order. Buffers are never selected, but
    for the running statistics of batch norm where `batch_norm_statistics` asks for them. A tensor that several modules
    share is selected, or excluded, by any of its names, and listed once, under the first of them.

    Args:
        model (`nn.Module`): The network. Where it has a `base_model_prefix` (as transformers' wrapper of timm models
            has), patterns may leave that prefix out.
        select (`str` or `Sequence[str]`): One or several of

            - a kind: `all`, `bias`, `norm`, `conv`, `linear`, `attention`, `blocks`, `head`;
            - the modules of a kind, sliced as a Python list: `norm[-2:]` is the last two normalization layers that have
              parameters, `conv[0]` the first convolution, `blocks[:3]` the first three blocks;
            - a glob over parameter names: `layer4.1.bn*`, or `*.lora_*` for the adapters of a PEFT model;
            - a regular expression that matches a whole name, after `re:`.
        exclude (`str` or `Sequence[str]`, *optional*): What to leave out of that, in the same terms.
        batch_norm_statistics (`bool`, *optional*, defaults to `False`): Whether `running_mean` and `running_var` of
            batch norm count as parameters of their layers.

    `attention` takes in all that is inside an attention layer, which is known by the name of its class. `head` is the
    last layer with a weight matrix. `blocks` are the members of the `ModuleList`s, `Sequential`s and `ModuleDict`s that
    hold modules of one composite type, such as `BasicBlock` or `ViTLayer`. Where a network has several such types (the
    stages around the blocks, the layers inside them), the blocks are those of the most numerous type that has at least
    two weight matrices.

    Raises:
        LayoutError: names the entry that selects nothing, and parameters with similar names.
    """
    selectable = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if batch_norm_statistics:
        norms = [name for name, m in model.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        statistics = [_join(name, statistic) for name in norms for statistic in STATISTICS]
        if not statistics:
            raise LayoutError(
                f"{type(model).__name__} has no batch norm with running statistics that could be generated; use "
                "batch_norm_statistics=base"
            )
        wanted = {*selectable, *statistics}
        selectable = [name for name in model.state_dict() if name in wanted]
    tied = tied_names(model)

    def found(patterns: str | Sequence[str]) -> set[str]:
        return {tied.get(name, name) for name in _match(model, selectable, patterns)}

    chosen = found(select) - (found(exclude) if exclude else set())
    if not chosen:
        raise LayoutError(f"nothing is left to generate: {exclude!r} excludes all that {select!r} selects")
    return tuple(name for name in selectable if name in chosen)


def _match(model: nn.Module, parameters: list[str], patterns: str | Sequence[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise LayoutError("no tensors were selected: give at least one kind or pattern, such as 'norm[-2:]'")
    prefix = getattr(model, "base_model_prefix", "")
    short = {name: name.removeprefix(f"{prefix}.") if prefix else name for name in parameters}
    chosen: set[str] = set()
    for pattern in patterns:
        if kind := _KIND.fullmatch(pattern):
            found = _match_kind(model, parameters, *kind.groups())
        elif pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise LayoutError(f"'{pattern}' is not a regular expression: {error}") from error
            found = {n for n in parameters if expression.fullmatch(n) or expression.fullmatch(short[n])}
        else:
            found = {n for n in parameters if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(short[n], pattern)}
        if not found:
            hint = _describe_kinds(model, parameters) if kind else closest_names(pattern, short.values())
            raise LayoutError(f"'{pattern}' selects no parameter of {type(model).__name__}; {hint}")
        chosen |= found
    return chosen


def _describe_kinds(model: nn.Module, parameters: list[str]) -> str:
    """Which kinds of modules a network has, and how many of each."""
    counts = {kind: len(_groups(model, parameters, kind)) for kind in (*MODULE_KINDS, "attention", "blocks", "head")}
    has = [f"{kind} ({count})" for kind, count in counts.items() if count]
    lacks = [kind for kind, count in counts.items() if not count]
    words = f"it has {', '.join(has)}" if has else "it has modules of no kind"
    return words + (f", and no {' or '.join(lacks)}" if lacks else "") + "; `all` selects everything"


def _match_kind(model: nn.Module, parameters: list[str], kind: str, start: str, colon: str, stop: str) -> set[str]:
    groups = _groups(model, parameters, kind)
    if "-" in (start, stop):
        raise LayoutError(f"'{kind}[{start}{colon}{stop}]' is not a slice: a number is missing after the minus sign")
    if colon:
        groups = groups[int(start) if start else None : int(stop) if stop else None]
    elif start:
        index = int(start)
        groups = groups[index : index + 1 or None]
    return set(itertools.chain.from_iterable(groups))


def _groups(model: nn.Module, parameters: list[str], kind: str) -> list[list[str]]:
    """The names among `parameters` of every module of a kind; for `all` and `bias`, each for itself."""
    if kind in ("all", "bias"):
        return [[name] for name in parameters if kind == "all" or name.rpartition(".")[2] == "bias"]
    named = dict(model.named_modules())
    if kind == "blocks":
        names = _find_blocks(model)
    elif kind == "attention":
        names = [name for name, module in named.items() if name and _has_name(module, "attention", "attn")]
        names = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    elif kind == "head":
        names = [n for n, m in named.items() if MODULE_KINDS["conv"](m) or MODULE_KINDS["linear"](m)][-1:]
    else:
        names = [name for name, module in named.items() if MODULE_KINDS[kind](module)]
    own = kind in MODULE_KINDS  # the tensors of these modules themselves, not of those inside them
    groups = []
    for prefix in (_join(name, "") for name in names):
        inside = [name for name in parameters if name.startswith(prefix)]
        groups.append([name for name in inside if not own or "." not in name.removeprefix(prefix)])
    return [group for group in groups if group]


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of `model`, in its own order; the rule is that of [`select_parameters`]."""
    found: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            children = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
            types = {type(child) for _, child in children}
            if len(types) == 1 and any(True for _ in children[0][1].children()):
                found.setdefault(types.pop(), []).extend(_join(name, child) for child, _ in children)
    if not found:
        return []

    def rank(names: list[str]) -> tuple[bool, int]:
        matrices = sum(parameter.ndim > 1 for parameter in model.get_submodule(names[0]).parameters())
        return bool(matrices > 1), len(names)

    return max(found.values(), key=rank)
