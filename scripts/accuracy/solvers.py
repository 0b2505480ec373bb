"""Scores of every solver of the package, for a case and a damping."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cases import Case
from truth import Scored

import influence_pipeline as ip

Damping = float | Literal["auto"] | None
DAMPINGS = (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
"""λ as parts of the mean eigenvalue, for the best in hindsight."""


@dataclass(frozen=True)
class Method:
    """A solver with its settings.

    Attributes:
        title: for people.
        settings: sections of a pipeline's settings, without the damping.
        direct: whether it solves by a factor, for a thousand samples as for one, so that other dampings are tried for
            the best in hindsight, and that there is the self-influence of every training sample.
    """

    title: str
    settings: dict[str, dict[str, Any]]
    direct: bool = True


SOLVERS = {
    "identity": Method("`identity`", {"s_test": {"solver": "identity"}}),
    "lissa": Method("`lissa`", {"s_test": {"solver": "lissa"}}, direct=False),
    "cg": Method("`cg`", {"s_test": {"solver": "cg"}}, direct=False),
    "nystrom": Method("`nystrom`, rank 256", {"s_test": {"solver": "nystrom", "rank": 256}}),
    "exact": Method("`exact`", {"s_test": {"solver": "exact"}}),
    "newton": Method(
        *("`exact`, Newton", {"s_test": {"solver": "exact"}, "influence": {"correction": "newton"}}),
        direct=False,  # a stage more for each λ
    ),
    "hessian": Method("`exact`, Hessian", {"s_test": {"solver": "exact", "curvature": "hessian"}}),
    "fisher": Method("`fisher`", {"s_test": {"solver": "fisher"}}),
    "kfac": Method("`kfac`", {"s_test": {"solver": "kfac"}}),
    "ekfac": Method("`ekfac`", {"s_test": {"solver": "ekfac"}}),
}


def scored(method: Method, case: Case) -> Iterator[Scored | str]:
    """Score with the default damping, then with the others; or say why there are no scores with one of them."""
    default = getattr(ip.Settings(**method.settings).s_test, "damping", None)
    chosen: Damping = getattr(default, "relative", default)
    dampings = [chosen]
    if method.direct and chosen is not None:
        dampings += [damping for damping in DAMPINGS if damping != chosen]
    with tempfile.TemporaryDirectory(prefix="accuracy_") as folder:
        for damping in dampings:
            try:
                yield _scored(method, case, damping, Path(folder))
            except ip.InfluenceError as error:
                yield f"{_shown(damping)}: {str(error).partition('. ')[0]}"


def _scored(method: Method, case: Case, damping: Damping, folder: Path) -> Scored:
    sections = {name: dict(section) for name, section in method.settings.items()}
    if damping is not None:
        relative = isinstance(damping, float) and damping > 0
        sections["s_test"]["damping"] = {"relative": damping} if relative else damping
    if sections["s_test"]["solver"] == "lissa":
        sections["s_test"]["recursion_depth"] = case.size.depth
    settings = ip.Settings(**sections, runtime={"progress": False, "device": "cpu"})
    pipeline = ip.Pipeline(case.experiment(), folder, settings)
    began = time.process_time()
    found = pipeline.run()["holdout"]
    seconds = time.process_time() - began
    own = pipeline.self_influence().values if method.direct and "influence" not in sections else None
    return Scored(_shown(damping), np.asarray(found.scores[:]), own, seconds)


def _shown(damping: Damping) -> str:
    if damping is None:
        return ""
    if damping == "auto":
        return "λ found"
    return f"λ = {damping:g} of the mean" if damping else "λ = 0"
