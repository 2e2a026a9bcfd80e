"""Makes torchjd.npz: what TorchJD's aggregators return for matrices of every kind.

Run by hand, with an interpreter that has torch 2.13.0 and torchjd[full] 0.18.0, in this
folder. Nothing of hardvary is involved.
"""

import numpy as np
import torch
import torchjd
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

# Nothing added to the Gramian, and nothing taken for 0 that is small.
EXACT = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
AGGREGATORS = {
    "upgrad": lambda: aggregation.UPGrad(projector=EXACT),
    "dualproj": lambda: aggregation.DualProj(projector=EXACT),
    "cagrad": lambda: aggregation.CAGrad(c=0.5, norm_eps=0.0),
    "imtl_g": aggregation.IMTLG,
    "aligned_mtl": aggregation.AlignedMTL,
    "config": aggregation.ConFIG,
    "fairgrad": lambda: aggregation.FairGrad(alpha=2.0),
    "nash_mtl": lambda: aggregation.FairGrad(alpha=1.0),
    "pcgrad": aggregation.PCGrad,
}
# Of which the solver is approximate for others. MGDA is left out: it is everywhere.
OF_SIZE_1 = ("fairgrad", "nash_mtl", "cagrad")


def matrices():
    """Name -> `[row, component]`, float64."""
    rng = np.random.default_rng(0)
    for rows in (2, 3, 5, 8):
        for rank in sorted({1, 2, rows}):
            for scale in (1e-10, 1.0, 1e10):
                values = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, 12))
                yield f"{rows}_rows_rank_{rank}_scale_{scale:g}", scale * values


def main():
    torch.set_default_dtype(torch.float64)
    saved = {}
    for name, matrix in matrices():
        saved[f"matrix:{name}"] = matrix
        rows, scale = len(matrix), np.abs(matrix).max()
        full = f"rank_{rows}" in name
        for rule, make in AGGREGATORS.items():
            if rule in OF_SIZE_1 and not (0.1 < scale < 10 and full):
                continue
            if rule == "pcgrad" and rows > 2:
                continue
            try:
                update = make()(torch.as_tensor(matrix))
            except Exception as error:  # its solver gave up
                print(rule, name, type(error).__name__, error)
                continue
            saved[f"{rule}:{name}"] = update.numpy()
    np.savez_compressed("torchjd.npz", **saved)
    print(torch.__version__, torchjd.__file__, len(saved))


if __name__ == "__main__":
    main()
