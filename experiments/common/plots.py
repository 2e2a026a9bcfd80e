"""One look for all figures. Importing this module imports Matplotlib.

Figures are made with `matplotlib.figure.Figure`, not through pyplot: they need no
display and no closing.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's palette, which stays apart under the common colour deficiencies.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PINK = "#CC79A7"

METHOD_COLORS = {
    "erm": VERMILION,
    "irm": PINK,
    "vrex": "#8C6D31",
    "group_dro": "0.55",
    "dann": ORANGE,
    "and_mask": BLUE,
    "geometric_mean": GREEN,
    "sand_mask": SKY_BLUE,
    "soft_and_mask": "#1A3E8C",
    "grad_drop": "#B15928",
    "disjoint_mean": "#66A61E",
    "majority_sign": "#17777A",
    "agr_rand": "#8DD3C7",
    "upgrad": "#6A3D9A",
    "dualproj": "#9E7BC4",
    "mgda": "#C51B7D",
    "cagrad": "#E78AC3",
    "nash_mtl": "#7A0177",
    "fairgrad": "#A6761D",
    "imtl_g": "#D9A441",
    "aligned_mtl": "#E31A1C",
    "config": "#FB8072",
    "pcgrad": "#525252",
    "grad_vac": "#969696",
    "clip_env_norms": "#4D6B3A",
}
METHOD_LABELS = {
    "erm": "Averaging (ERM)",
    "irm": "IRM",
    "vrex": "V-REx",
    "group_dro": "Group DRO",
    "dann": "DANN",
    "and_mask": "AND-mask",
    "geometric_mean": "Geometric mean",
    "sand_mask": "SAND-mask",
    "soft_and_mask": "Soft AND-mask",
    "grad_drop": "GradDrop",
    "disjoint_mean": "Disjoint mean",
    "majority_sign": "Majority sign",
    "agr_rand": "Agr-Rand",
    "upgrad": "UPGrad",
    "dualproj": "DualProj",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "nash_mtl": "Nash-MTL",
    "fairgrad": "FairGrad",
    "imtl_g": "IMTL-G",
    "aligned_mtl": "Aligned-MTL",
    "config": "ConFIG",
    "pcgrad": "PCGrad",
    "grad_vac": "GradVac",
    "clip_env_norms": "Clipped mean",
}

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.labelsize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2.0,
}


def use_style() -> None:
    """Applies the project's style to all figures made from here on."""
    mpl.rcParams.update(STYLE)


def percent_axis(axes: Axes) -> None:
    """Labels a y axis of fractions in percent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
