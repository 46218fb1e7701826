"""Verdict on a fit: whether to trust its law, with a number for each reason."""

from __future__ import annotations

from typing import NamedTuple

from isoflop.scaling.report import FitReport, HeldOutBudget, Parametric, PowerLaw

CLOSE = 0.01  # of the loss. Assumption: a plan tolerates this error; neighbouring sizes at a budget differ by less
AGREE = 1.25  # ratio of N between two methods. Assumption: at this factor from the optimum the loss rises by less than 0.1%
FAR = 10.0  # times the largest budget. Assumption: holding out one step of a design's budgets tests a further step like it


class Reason(NamedTuple):
    """A condition for trust, and whether the fit meets it."""

    holds: bool
    text: str


def verdict_of(report: FitReport) -> str:
    """Return the verdict, and a line for each reason."""
    fit = report.parametric
    if not fit.converged:
        return f"Verdict: do not use this law. The parametric fit is {fit.status.replace('_', ' ')}: {fit.detail}"
    reasons = [_held_out(report.leave_largest_out), _agreement(report), *_reach(report)]
    failed = sum(not reason.holds for reason in reasons)
    verdict = (
        f"take this law with caution: of {len(reasons)} grounds for trust {failed} fail"
        if failed
        else "this law can be trusted as far as these budgets: all grounds for trust hold"
    )
    return "\n".join(
        [f"Verdict: {verdict}.", "", *(f"* {'holds' if reason.holds else 'fails'}: {reason.text}" for reason in reasons)]
    )


def _held_out(found: HeldOutBudget) -> Reason:
    if found.inside is None:
        return Reason(False, f"not tested on a held-out larger budget: {found.reason}")
    worst, inside = max(abs(run.error) for run in found.runs), round(found.inside * len(found.runs))
    text = (
        f"fitted without the largest budget, it predicts its runs within {worst:.2%} of their loss, {inside} of"
        f" {len(found.runs)} inside their 90% intervals"
    )
    return Reason(found.status == "converged" and worst <= CLOSE, text)


def _agreement(report: FitReport) -> Reason:
    """Compare the three approaches of Hoffmann et al. 2022."""
    approaches: dict[str, Parametric | PowerLaw] = {
        "parametric": report.parametric,
        "isoflop": report.isoflop,
        "envelope": report.envelope,
    }
    fitted = {name: approach for name, approach in approaches.items() if approach.n_opt}
    if len(fitted) < 2 or not report.predict:
        return Reason(False, "no second method was fitted")
    flops = max(report.predict)
    sizes = [approach.n_opt[report.predict.index(flops)] for approach in fitted.values()]
    ratio = max(sizes) / min(sizes)
    return Reason(ratio <= AGREE, f"at {flops:.3g} FLOPs the N of {', '.join(fitted)} differ by a factor of {ratio:.3g}")


def _reach(report: FitReport) -> list[Reason]:
    if not report.predict:
        return []
    flops = max(report.predict)
    ratio = flops / report.points.flops[1]
    return [Reason(ratio <= FAR * (1 + 1e-9), f"{flops:.3g} FLOPs are {ratio:.3g} times the largest budget it was fitted to")]
