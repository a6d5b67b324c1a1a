"""`loopsway inspect`: what an index holds, for people or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .failure import in_one_line, needs

if TYPE_CHECKING:
    from rich.console import Console

    from loopsway.indexer import Index

# Description is a JSON document: its values are as they are printed by --json.
Description = dict[str, Any]


@click.command(short_help="Show what an index holds.")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else.")
@click.option("--plan", "only_plan", is_flag=True, help="How each parameter is sketched, and what that costs.")
def inspect(path: str, as_json: bool, only_plan: bool) -> None:
    """Shows what the index at PATH holds: sizes, checkpoints, and each step's norms; with --plan how it was built."""
    with in_one_line(), needs("inspecting needs the indexer", "indexer,cpu"):
        from loopsway.indexer import open_index

        description = describe(open_index(path))
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    with needs("printing tables needs the command's extra", "cli"):
        from rich.console import Console
    if only_plan:
        show_plan(description, Console())
    else:
        show(description, Console())


def describe(index: Index) -> Description:
    """What the index holds, as a JSON document."""
    norms = index.step_norms()  # [S, N]
    means = norms.mean(axis=1)
    shares = means / max(float(means.sum()), 1e-300)
    without = set(index.steps_without_gradient)
    losses = index.mean_losses()
    return {
        "path": str(index.path),
        "name": index.name,
        "examples": index.num_examples,
        "skipped": index.num_skipped,
        "steps": index.num_steps,
        "width": index.width,
        "bits": index.bits,
        "seed": index.config.seed,
        "size_bytes": index.size_bytes,
        # A row is one example at one step, or its total.
        "bytes_per_row": index.size_bytes / (index.num_examples * (index.num_steps + 1)),
        "generation": index.generation,
        "created_at": index.created_at,
        "fingerprint": index.fingerprint,
        "task": index.task_spec,
        "task_arguments": index.task_arguments,
        "loop": index.loop.to_dict(),
        "checkpoints": [
            {"name": checkpoint.name, "learning_rate": checkpoint.learning_rate, "mean_loss": float(loss)}
            for checkpoint, loss in zip(index.checkpoints, losses, strict=True)
        ],
        "recall": index.recall,
        "steps_without_gradient": sorted(without),
        "step_norms": [
            {
                "step": step,
                "slot": slot,
                "mean": float(means[step]),
                "median": float(_median(norms[step])),
                "share": float(shares[step]),
                "has_gradient": step not in without,
            }
            for step, slot in enumerate(index.slots)
        ],
        "plan": index.plan,
    }


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))


def show(description: Description, console: Console) -> None:
    """Prints the document for a person."""
    from .tables import pairs

    console.print(pairs(_facts(description)))
    console.print()
    console.print(_checkpoints(description))
    console.print()
    console.print(_steps(description))
    if without := description["steps_without_gradient"]:
        steps = ", ".join(map(str, without))
        console.print(
            f"\nsteps without gradient: {steps}. Training ran them detached or under no_grad: their zeros say nothing "
            "about influence.",
            style="yellow",
        )


def show_plan(description: Description, console: Console) -> None:
    """Prints how each parameter is sketched, and how long that was expected to take and took."""
    from rich.text import Text

    from .tables import listing

    if not description["plan"]:
        console.print(f"{description['path']} keeps no plan: it was built by an earlier version")
        return
    text = ["parameter", "shape", "path", "note"]
    table = listing(["parameter", "shape", "path", "uses", "expected ms", "measured ms", "note"], text=text)
    table.columns[0].overflow = "fold"  # the ends of the names tell them apart
    for entry in description["plan"]:
        table.add_row(
            Text(entry["parameter"]),
            " x ".join(map(str, entry["shape"])),
            entry["path"],
            str(entry["uses"]),
            *(_milliseconds(entry[kind]) for kind in ("expected_ms", "measured_ms")),
            Text(entry["note"] or ""),
        )
    console.print(table)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _facts(description: Description) -> dict[str, str]:
    loop, arguments = description["loop"], description["task_arguments"]
    in_brackets = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return {
        "index": description["path"],
        "examples": f"{description['examples']:,}"
        + (f", of which {description['skipped']:,} skipped" if description["skipped"] else ""),
        "steps": f"{description['steps'] - 2}, and what is before and after the loop"
        if loop["outside"]
        else str(description["steps"]),
        "sketch": f"width {description['width']:,}, {description['bits']} bit{'s' * (description['bits'] != 1)}, "
        f"seed {description['seed']}",
        "on disk": f"{description['size_bytes'] / 2**20:,.1f} MiB, {description['bytes_per_row']:,.0f} bytes for each "
        "example and step",
        "task": f"{description['task']}({in_brackets})" if description["task"] else "not recorded",
        "loop": f"body {', '.join(loop['body'])}; a step begins at each call of {loop['marker'] or 'its first module'}",
        "recall@10": _recall(description["recall"]),
        "built": f"{description['created_at']}, generation {description['generation']}",
        "fingerprint": description["fingerprint"],
    }


def _recall(recall: dict[str, Any]) -> str:
    """Of approximate search; an earlier version's build measured less of it."""
    if "recall@10" not in recall:
        return "not measured"
    text = f"{recall['recall@10']:.3f} of approximate against exact search"
    if "efforts" in recall:
        least, efforts = min(recall["by_slot"].values()), recall["efforts"].values()
        text += f", no less than {least:.3f} at any step; {recall['factory'] or 'default'}, effort up to {max(efforts)}"
    return text


def _checkpoints(description: Description) -> Any:
    from .tables import listing

    table = listing(["checkpoint", "learning rate", "mean loss"], text=["checkpoint"])
    for checkpoint in description["checkpoints"]:
        table.add_row(checkpoint["name"], f"{checkpoint['learning_rate']:.3g}", f"{checkpoint['mean_loss']:.4f}")
    return table


def _steps(description: Description) -> Any:
    from .tables import bar, listing

    table = listing(["step", "mean norm", "median", "share", ""], text=[""])
    steps = description["step_norms"]
    largest = max((step["share"] for step in steps), default=0.0) or 1.0
    for step in steps:
        table.add_row(
            step["slot"],
            f"{step['mean']:.3g}",
            f"{step['median']:.3g}",
            f"{step['share']:.1%}",
            bar(step["share"] / largest) if step["has_gradient"] else "no gradient",
        )
    return table
