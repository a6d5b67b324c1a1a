"""Who gives the right per-example gradients on looped transformers, and who gives their steps.

    runs/peers-venv/bin/python tests/benchmarks/peers/who_is_right.py [--smoke] [--traceback]

Make the environment with make_venv.sh, beside this file. For each model and tool: the relative error (Frobenius) of the
inner products <g_i, g_j> of whole gradients of six examples, against autograd in float64, one example at a time, over
the largest set of the body's parameters that the tool takes; or the error that it refuses with. A tool is right below
1e-3. `steps` is the same error over all pairs of (example, step), against fresh copies of the parameters at each step.
The last table is a summary.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import contextlib
import io
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import version

import torch
from measurement import markdown_table
from models import SUBJECTS, Subject, exact_step_gradients, examples
from tools import BIASES, TOOLS, WEIGHTS, Tool
from torch import Tensor

RIGHT = 1e-3
DISTRIBUTIONS = (
    "torch", "transformers", "step-decomposed-influence", "bergson", "dattri", "kronfluence", "logix-ai", "traker",
    "captum",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Of one tool on one model.

    Attributes:
        verdict: "right", "wrong" or "refuses".
        kind: of parameters it was asked for.
        error: of inner products of whole gradients, or the words that it refuses with.
        steps: the same of steps, or "none".
    """

    verdict: str
    kind: str
    error: str
    steps: str


def find(tool: Tool, subject: Subject, tokens: Tensor, show: bool) -> Finding:
    """The first kind of parameters that the tool takes; if it refuses them all, what it said of the largest."""
    refusals = []
    for kind in tool.kinds:
        names = subject.parameters(subject.make(), kind)
        label = WEIGHTS if kind == BIASES and not any(name.endswith(".bias") for name in names) else kind
        exact = exact_step_gradients(subject, subject.make(), tokens, names)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                error = _gram_error(tool.gram(subject, subject.make(), tokens, kind), exact.sum(1))
                steps = _steps_error(tool, subject, tokens, kind, exact)
        except Exception as refusal:  # whatever a tool raises is its answer
            if show:
                traceback.print_exception(refusal)
            refusals.append(Finding(verdict="refuses", kind=label, error=_in_few_words(refusal), steps="none"))
        else:
            return Finding(verdict="right" if error < RIGHT else "wrong", kind=label, error=f"{error:.2g}", steps=steps)
    return refusals[0]


def _gram_error(gram: Tensor, gradients: Tensor) -> float:
    exact = gradients @ gradients.T
    return float((gram.double() - exact).norm() / exact.norm())


def _steps_error(tool: Tool, subject: Subject, tokens: Tensor, kind: str, exact: Tensor) -> str:
    if tool.steps is None:
        return "none"
    steps = tool.steps(subject, subject.make(), tokens, kind).detach().double()
    if steps.shape[1] != exact.shape[1]:
        return f"{steps.shape[1]} of {exact.shape[1]} steps"
    flat = steps.flatten(0, 1)
    return f"{_gram_error(flat @ flat.T, exact.flatten(0, 1)):.2g}"


def _in_few_words(error: Exception) -> str:
    words = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {words[:90]}" + ("…" if len(words) > 90 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one model, three tools")
    parser.add_argument("--traceback", action="store_true", help="show where each refusal comes from")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    subjects, tools = (SUBJECTS[:1], TOOLS[:3]) if arguments.smoke else (SUBJECTS, TOOLS)
    print(", ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS), end="\n\n")
    tokens, summary = examples(), {tool.name: [tool.name] for tool in tools}
    for subject in subjects:
        rows = []
        for tool in tools:
            finding = find(tool, subject, tokens, arguments.traceback)
            rows.append((tool.name, finding.verdict, finding.kind, finding.error, finding.steps))
            summary[tool.name].append(_cell(finding))
        print(f"### {subject}\n")
        header = ("tool", "verdict", "parameters", "error of inner products", "error of steps")
        print(markdown_table(header, rows), flush=True, end="\n\n")
    print("### Summary\n")
    print(markdown_table(("tool", *(str(subject) for subject in subjects)), list(summary.values())))


def _cell(finding: Finding) -> str:
    match finding.verdict:
        case "right":
            return f"right ({finding.kind}); " + ("no steps" if finding.steps == "none" else f"steps {finding.steps}")
        case "wrong":
            return f"**wrong**, {finding.error}"
        case _:
            return "refuses"


if __name__ == "__main__":
    main()
