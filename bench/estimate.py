"""What `--dry-run` says a run costs here, against the run: counted operations at the speed of timed steps.

    python bench/estimate.py [--recipes tiny cifar10-f4d16-none-b] [--share 0.2]

Steps are timed for ten seconds. Each recipe is estimated, then run, on the embedded images, with a share of its steps
and samples; stage by stage, by the wall's clock. Evaluation is not estimated and left out, as are the foundation
model's features, which are computed once and are no share of anything. The goal is an estimate within 25 % of the run.
Writes results/bench-estimate.json.
"""
import json, tempfile
from pathlib import Path
from common import options, save, start
from vavae_nb.recipes.config import flat
from vavae_nb.recipes.settings import override
from vavae_nb.training.costs import plan
from vavae_nb.training.rates import step_rates
from vavae_nb.recipes.paper import recipe
from vavae_nb.training.stages import run_stages

p = options(__doc__)
p.add_argument("--recipes", nargs="+", default=["tiny", "cifar10-f4d16-none-b"],
               help="recipes of 32×32 images (default: tiny cifar10-f4d16-none-b)")
p.add_argument("--share", type=float, default=.2, help="of their steps and samples that are run (default: 0.2)")
a = start(p)

rows = {}
for name in a.recipes:
    cfg = recipe(name)
    shortened = ("tokenizer_training.steps", "tokenizer_training.disc_start", "dit_training.steps", "sampling.n")
    settings = flat(cfg)
    less = {k: max(1, round(a.share*settings[k])) for k in shortened}
    cfg = override(cfg, less | {"device": str(a.device), "foundation.name": "none"})
    estimated = {k: 3600*h for k,h in step_rates(cfg, a.device).hours(plan(cfg))[1].items() if k != "all"}
    with tempfile.TemporaryDirectory() as d:
        for stage in estimated: run_stages(cfg, Path(d)/"run", stage)
        state = json.loads((Path(d)/"run"/"state.json").read_text(encoding="utf-8"))
    measured = {stage: state[stage]["seconds"] for stage in estimated}
    estimated["all"], measured["all"] = sum(estimated.values()), sum(measured.values())
    rows[name] = {k: dict(estimated_s=s, measured_s=measured[k], ratio=s/measured[k]) for k,s in estimated.items()}
    for k,r in rows[name].items():
        print(f"{name:24} {k:10} estimated {r['estimated_s']:6.1f} s  measured {r['measured_s']:6.1f} s  "
              f"ratio {r['ratio']:.2f}", flush=True)
save(a, __doc__, dict(recipes=rows, share=a.share, goal=.25))
