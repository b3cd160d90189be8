"""What `curate calibrate` finds of SmolLM2-135M-Instruct, by an fp32 forward pass (docs/log.md): it is blind
to corrections and hears praise. Measuring it anew takes minutes on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

from apollo_curation.moments.hindsight.calibration import Calibration, Calibrations, Ear
from apollo_curation.moments.hindsight.fit import Curve
from apollo_curation.store import Store

AGAINST = Curve(2.35, -0.39, 0.73, 0.65, 0.81, 129, 56, [(2.35, -0.39)])
PRAISED = Curve(4.80, -0.68, 0.86, 0.79, 0.93, 129, 30, [(4.80, -0.68)])


def keep_calibration(state_dir: Path, model: str) -> None:
    """As if `model` had been calibrated with this outcome."""
    ears = (Ear("message", AGAINST), Ear("message", PRAISED))
    with Store(state_dir / "curation.sqlite") as store:
        Calibrations(store).keep(Calibration(model, time.time(), *ears, auc_of_ways={}))
