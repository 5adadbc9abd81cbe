"""``ssmgen cache why``: why two kernels differ, and why a kernel is or is not found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from .. import compiler, policy, template
from ..arch import Arch
from ..config import KernelConfig
from ..plan import Choice, Plan
from ..store import Store, stores
from ..store.layers import named, refusal, remote
from ..store.peek import fault
from .entries import Entry, entries, fail, plan_text, print_json, print_table, say
from .inputs import KEY_OR_CONFIG, ArchOf, Json, is_key
from .selection import entries_of, read_target

__all__ = ["differences", "why"]


def why(
    a: Annotated[str, typer.Argument(metavar="KEY|CONFIG", help=KEY_OR_CONFIG)],
    b: Annotated[
        str | None, typer.Argument(metavar="[KEY|CONFIG]", help="What to compare it with.")
    ] = None,
    arch: ArchOf = None,
    as_json: Json = False,
) -> None:
    """Say why two kernels are not one, or why a kernel is or is not found.

    With two arguments: every factor by which the keys differ, with both values. Of a config it is
    the kernel for the largest sizes.

    With one config: for each of its kernels, what would serve it; or how it stands in each layer
    (absent, of another toolchain only, bad, refused), the entry most like it, and the command that
    would put it there. Exits with 1 unless every kernel is served.

        ssmgen cache why 3f9c 81d2

        ssmgen cache why 3f9c '{"state_dtype": "fp16"}' --arch sm_90

        ssmgen cache why config.json --arch sm_90
    """
    if b is None:
        _why_config(a, arch, as_json)
    else:
        _why_two(a, b, arch, as_json)


def _why_two(a: str, b: str, arch: str | None, as_json: bool) -> None:
    left, right = _side(a, arch), _side(b, arch)
    found = differences(left.pop("factors"), right.pop("factors"))
    if as_json:
        print_json({"a": left, "b": right, "same": not found, "differences": found})
        return
    for name, side in (("a", left), ("b", right)):
        say(f"{name}: {side['key']}  {', '.join(side['toolchains'])}")
    if not found:
        same = left["toolchains"] == right["toolchains"]
        say("the same kernel" + ("" if same else ", by different toolchains"))
        return
    print_table(
        ("factor", "a", "b"),
        [(row["factor"], _value(row, "a"), _value(row, "b")) for row in found],
    )


def _side(text: str, arch: str | None) -> dict[str, Any]:
    """Key, factors and toolchains of one side of a comparison."""
    if is_key(text):
        found = entries_of(text, arch)
        good = next((entry for entry in found if entry.artifact), None)
        if good is None:
            fail(f"bad entry {found[0].path}: {found[0].fault}")
        toolchains = list(dict.fromkeys(entry.toolchain for entry in found))
        return {"key": good.key, "factors": good.factors, "toolchains": toolchains}
    config, target, choices = read_target(text, arch)
    plan = choices[-1].plan
    here = compiler.toolchain()
    return {
        "key": template.key(config, plan, target),
        "factors": template.factors(config, plan, target),
        "toolchains": [here] if here else [],
    }


def _why_config(text: str, arch: str | None, as_json: bool) -> None:
    if is_key(text):
        raise typer.BadParameter("give two keys, or a config")
    config, target, choices = read_target(text, arch)
    report: dict[str, Any] = {
        "arch": str(target),
        "config": config.fields(),
        "toolchain": compiler.toolchain(),
        "may_compile": policy.allowed(),
        "plans": _plans(config, target, choices),
        "command": policy.prewarm_command(config, target),
    }
    if as_json:
        print_json(report)
    else:
        for plan in report["plans"]:
            _show_plan(plan, report)
    if any(plan["served_by"] is None for plan in report["plans"]):
        if not as_json:
            say("To get what is missing:")
            say(f"  {report['command']}")
        raise typer.Exit(1)


def _show_plan(plan: dict[str, Any], report: dict[str, Any]) -> None:
    heads = ", ".join("any" if n is None else f"<= {n}" for n in plan["batch_x_heads_up_to"])
    say(f"{plan['key'][:12]}  {plan_text(plan['plan'])}, batch x heads {heads}")
    if by := plan["served_by"]:
        extra = "" if plan["outcome"] == "hit" else f", not by {report['toolchain'] or 'one here'}"
        say(f"  hit: {by['root']} ({by['origin']}), by {by['toolchain']}{extra}")
        return
    if plan["outcome"] == "compile":
        say(f"  miss: {report['toolchain']} would compile it")
    else:
        barred = "no Triton here" if report["toolchain"] is None else "SSMGEN_JIT=deny"
        say(f"  miss: an error, since it may not be compiled ({barred})")
    for layer in plan["layers"]:
        detail = f": {layer['detail']}" if layer["detail"] else ""
        say(f"  {layer['root']} ({layer['origin']}): {layer['state']}{detail}")
    if near := plan["nearest"]:
        say(f"  nearest: {near['key'][:12]} in {near['root']}, {near['toolchain']}")
        for row in near["differences"]:
            say(f"    {row['factor']}: {_value(row, 'a')}, there {_value(row, 'b')}")


def _value(row: dict[str, Any], side: str) -> str:
    return str(row[side]) if side in row else "(none)"


def differences(a: Any, b: Any) -> list[dict[str, Any]]:
    """Where two sets of factors differ: the dotted path and each side's value, if it has one."""
    left, right = dict(_flat(a, "")), dict(_flat(b, ""))
    found = []
    for path in dict.fromkeys((*left, *right)):
        sides = {side: all_[path] for side, all_ in (("a", left), ("b", right)) if path in all_}
        if len(sides) < 2 or sides["a"] != sides["b"]:
            found.append({"factor": path, **sides})
    if not found and a != b:  # the same rows in another order
        found = [{"factor": name, "a": a[name], "b": b[name]} for name in a if a[name] != b[name]]
    return found


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(v, list) and v for v in value):
        value = {str(name): rest for name, *rest in value}  # rows that begin with a name
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{path}.{name}" if path else name)


def _plans(config: KernelConfig, arch: Arch, choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """What `get_kernel` would find for each plan of a config."""
    limits: dict[Plan, list[int | None]] = {}
    for choice in choices:
        limits.setdefault(choice.plan, []).append(choice.limit)
    known = entries(stores())
    plans = []
    for plan, serves in limits.items():
        factors = template.factors(config, plan, arch)
        key = template.key(config, plan, arch)
        plans.append(
            {
                "plan": plan.fields(),
                "batch_x_heads_up_to": serves,
                "key": key,
                **_found(key),
                "nearest": _nearest(key, factors, known),
            }
        )
    return plans


def _found(key: str) -> dict[str, Any]:
    """The outcome for one key, and how it stands in each layer. As `kernel.build` looks."""
    wanted, may_compile = compiler.toolchain(), policy.allowed()
    layers = [(store, *_state(store, key, wanted)) for store in named()]
    trusted = [(store, good) for store, state, _, good in layers if state != "refused"]
    served = None
    if wanted is not None:
        served = next((_by(s, wanted) for s, good in trusted if wanted in good), None)
        served = served or _far(key, wanted)
    outcome = "hit"
    if served is None and (wanted is None or not may_compile):
        served = next((_by(s, good[0]) for s, good in trusted if good), None) or _far(key, None)
        outcome = "other toolchain"
    if served is None:
        outcome = "compile" if wanted is not None and may_compile else "error"
    return {
        "outcome": outcome,
        "served_by": served,
        "layers": [
            {"root": str(store.root), "origin": store.origin, "state": state, "detail": detail}
            for store, state, detail, _ in layers
        ],
    }


def _by(store: Store, toolchain: str) -> dict[str, Any]:
    return {"root": str(store.root), "origin": store.origin, "toolchain": toolchain}


def _far(key: str, toolchain: str | None) -> dict[str, Any] | None:
    far = remote()
    found = far.fetch(key, toolchain) if far else None
    if far is None or found is None:
        return None
    return {"root": far.url, "origin": "remote", "toolchain": found.manifest["toolchain"]}


def _state(store: Store, key: str, wanted: str | None) -> tuple[str, str | None, list[str]]:
    """How a key stands in a store, more about it, and the toolchains that have a good entry."""
    if why := refusal(store):
        return "refused", why, []
    faults = {name: fault(store, key, name) for name in store.toolchains(key)}
    good = [name for name, wrong in faults.items() if wrong is None]
    if wanted in good:
        return "hit", wanted, good
    bad = "; ".join(f"{name}: {wrong}" for name, wrong in faults.items() if wrong is not None)
    if bad and (not good or wanted in faults):
        return "bad", bad, good
    return ("other toolchain", ", ".join(good), good) if good else ("absent", None, [])


def _nearest(key: str, factors: dict[str, Any], known: list[Entry]) -> dict[str, Any] | None:
    """The entry of another key with the fewest differing factors."""
    best: dict[str, Any] | None = None
    for entry in known:
        if entry.artifact is None or entry.key == key:
            continue
        found = differences(factors, entry.factors)
        if best is None or len(found) < len(best["differences"]):
            best = {
                "key": entry.key,
                "toolchain": entry.toolchain,
                "root": str(entry.store.root),
                "differences": found,
            }
    return best
