"""The moving average of a LightningDiT's weights after a step, all tensors in one call, against a loop over them.

    python bench/ema.py [--rounds 15] [--threads 2] [--device auto] [--sizes B …]

Baseline: for each parameter by name, `average.mul_(decay).add_(p, alpha=1-decay)`, as published. Ours: the callback
`EMA` of the training. fp32, decay 0.9999, both averages start alike and are compared after all rounds (1e-5).
LightningDiT-tiny (on a CPU), B, and XL of 675 million parameters, which takes 8 GB. Writes results/bench-ema.json.
"""
import copy
import torch
from types import SimpleNamespace
from common import agree, compare, options, save, show, start, take_turns
from published import update_ema
from vavae_nb.dit.cost import count_params
from vavae_nb.dit.model import create_dit
from vavae_nb.training.callbacks import EMA

p = options(__doc__, rounds=15)
p.add_argument("--sizes", nargs="+", help="of LightningDiT (default: B XL, and tiny on a CPU)")
a = start(p)
goal, rows = 5. if a.device.type == "cuda" else 1.5, {}
for size in a.sizes or ["tiny"]*(a.device.type == "cpu")+["B", "XL"]:
    with a.device: model = create_dit(size)
    ours = EMA()
    ours.learn = SimpleNamespace(model=model)
    ours.before_fit()
    theirs = copy.deepcopy(ours.average)
    with torch.no_grad():
        for q in model.parameters(): q += .1 # Something to move towards
    sides = dict(baseline=lambda: update_ema(theirs, model, ours.decay), ours=ours.after_step)
    row = compare(take_turns(sides, a.rounds, a.device))
    error = max(agree(ours.average[k], theirs[k], 1e-5, k) for k in theirs)
    rows[size] = row | dict(parameters=count_params(model), tensors=len(list(model.parameters())), rel_err=error)
    moved = 3*4*count_params(model)/1e6 # Read the average and the weight, write the average
    rows[size] |= dict(gb_per_second=moved/min(row["ours_wall_ms"]))
show(rows, goal)
save(a, __doc__, dict(sizes=rows, goal=goal, decay=ours.decay))
