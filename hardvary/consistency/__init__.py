"""Consistency of minima across environments: the theory behind the masks, computed.

A minimum is inconsistent if one environment's loss can rise far where another's hardly
changes: environments share it by accident, each for reasons of its own. `inconsistency`
measures that for a network, `grid_inconsistency` on a slice, `quadratic_inconsistency`
from Hessians, and `ilc` for a whole algorithm.
"""

from hardvary.consistency.algorithms import ILC, ilc
from hardvary.consistency.grids import GridInconsistency, grid_inconsistency
from hardvary.consistency.means import karcher_mean
from hardvary.consistency.scores import determinant_bound, quadratic_inconsistency
from hardvary.consistency.search import Inconsistency, inconsistency

__all__ = [
    "ILC",
    "GridInconsistency",
    "Inconsistency",
    "determinant_bound",
    "grid_inconsistency",
    "ilc",
    "inconsistency",
    "karcher_mean",
    "quadratic_inconsistency",
]
