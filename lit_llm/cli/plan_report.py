"""Text output of `lit-llm plan`."""

from __future__ import annotations

from typing import Any


def report(found: dict[str, Any]) -> list[str]:
    """Formats a plan as lines of text."""
    if "steps" not in found:
        p = found["probe"]
        return [
            f"measured here: {p['seconds_per_step']:.4g} s per step, {p['tokens_per_second']:,.0f} {p['unit']}s/s; "
            f"peak {gib(p['peak'])}; no more can be planned, since shapes alone do not tell what a step takes"
        ]
    step, machine = next(iter(found["steps"].values())), found["machine"]
    batch = f"{found['batch_size']} × {found['seq_len']}" if found["seq_len"] else f"{found['batch_size']}"
    unit = "token" if found["seq_len"] else "example"
    devices = found["devices"]
    lines = [
        f"{found['network']}: {step['parameters']:,} parameters, {step['embeddings']:,} of them embeddings that are "
        f"looked up, {step['trained']:,} trained" + ", plus an average of all" * found["averages"],
        f"{found['flops_per_token']:.4g} operations per {unit}, forward and backward; batches of {batch} per device in "
        f"{found['precision']}",
    ]
    if found["tokens_per_batch"] != step["tokens"]:
        lines.append(
            f"memory is that of the longest batch of an epoch, time that of their mean, "
            f"{found['tokens_per_batch']:,.1f} {unit}s with padding"
        )
    if "probe" in found:
        p = found["probe"]
        lines += [
            f"measured here: {p['seconds_per_step']:.4g} s per step, {p['tokens_per_second']:,.0f} {unit}s/s, "
            f"{p['flops_per_second']:.4g} operations/s; peak {gib(p['peak'])} (planned {gib(step['peak'])})"
        ]
    each = f"each of {devices} devices" if devices > 1 else "one device"
    for name, strategies in found["memory"].items():
        lines += [
            "",
            f"Memory of {each}, {name}; {gib(machine['memory'])} available",
            f"{'':<22}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'activations':>12}{'peak':>12}",
        ]
        for strategy, m in strategies.items() if devices > 1 else [("one device", strategies["ddp"])]:
            fits = "fits" if m["peak"] <= machine["memory"] else "does not fit"
            columns = ("weights", "gradients", "optimizer", "activations", "peak")
            lines.append(f"{strategy:<22}" + "".join(f"{gib(m[c]):>12}" for c in columns) + f"  {fits}")
    b = found["bill"]
    speed = "the measured speed" if "probe" in found else f"{machine['mfu']:.0%} of {machine['peak_flops']:.4g}/s"
    if found["optimal_tokens"]:
        length = f"Compute-optimal: {found['optimal_tokens']:.4g} {unit}s, 20 per parameter (Hoffmann et al., 2022)"
    else:
        length = {
            "option": f"Planned for --tokens, {found['tokens']:.4g} {unit}s",
            "config": f"Planned for what the config trains on, {found['tokens']:.4g} {unit}s",
            "step": f"Planned for a single step, {found['tokens']:.4g} {unit}s; give --tokens for all of a run",
        }[found["tokens_from"]]
    lines += [
        "",
        length,
        f"{found['tokens']:.4g} {unit}s on {devices} × {machine['watts']:g} W at {speed}: {duration(b['seconds'])}"
        f"{exchange(b, devices, machine['mfu'])}, {b['kilowatt_hours']:,.4g} kWh" + cost(b),
    ]
    if "table" in found:
        lines += [
            "",
            "fsdp with the same batch on each device; strong: the batch of 8 devices, split (– if there are fewer rows "
            "than devices). Planned, not measured.",
            f"{'devices':>8}{'memory':>12}{'checkpointed':>14}{'time':>14}{'kWh':>12}{'weak':>7}{'strong':>8}",
        ]
        for count, row in found["table"].items():
            strong = "–" if row["strong_efficiency"] is None else f"{row['strong_efficiency']:.0%}"
            lines.append(
                f"{count:>8,}{gib(row['memory']):>12}{gib(row['memory_checkpointed']):>14}"
                f"{duration(row['seconds']):>14}{row['kilowatt_hours']:>12,.4g}{row['efficiency']:>7.0%}"
                f"{strong:>8}{cost(row)}"
            )
    return lines


def exchange(bill: dict[str, Any], devices: int, mfu: int | float) -> str:
    """Text on whether communication between devices limits a bill's time; empty for one device."""
    if devices == 1:
        return ""
    if bill["efficiency"] == 1:
        return " under fsdp, whose communication overlaps with it"
    computing = duration(bill["seconds"] * bill["efficiency"])
    return (
        f" under fsdp, limited by communication ({computing} of computation): "
        f"{mfu * bill['efficiency']:.0%} of the peak"
    )


def cost(bill: dict[str, Any]) -> str:
    """Text of a bill's cost; empty if the price is unknown."""
    return "" if bill["cost"] is None else f", cost {bill['cost']:,.4g}"


def gib(count: int | float) -> str:
    """Formats a number of bytes in MiB or GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def duration(seconds: int | float) -> str:
    """Formats seconds in the largest unit that fits, up to days.

    Example:
        >>> duration(90), duration(200_000)
        ('1.5 min', '2.3 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
