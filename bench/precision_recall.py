"""Precision and recall: distances a pair of blocks at a time, against the dense form.

    python bench/precision_recall.py [--n 6000] [--dim 2048] [--threads 2] [--rounds 2]

Baseline: the dense form, that of torch-fidelity: `torch.cdist` of whole sets, `kthvalue`, comparisons; in float64 as
ours decides, and as a row of its own in fp32, torch-fidelity's default, which may differ in features on a ball's edge
(to 1e-3). Ours: `precision_recall`, with chunks of 1,024 (on a GPU 8,192). Both where the features are: on the GPU if
there is one. Features are synthetic, with falling variances, non-negative as pooled ones are. Precision and recall must
be the same to 1e-6. Sets are as large as fit in the time, so 50,000 × 50,000 is for a machine where that is a minute or
two: with --n 50000 the dense form takes 60 GB; --ours measures ours alone. Memory is the highest resident set of a
process for each side (Linux), or the GPU's, less the features. Writes results/bench-precision-recall.json.
"""
from functools import partial
import torch
from common import agree, compare, options, peak, print_peak, save, show, start, take_turns, timed
from vavae_nb.metrics.distribution import precision_recall
from vavae_nb.base.tensors import generator

p = options(__doc__, rounds=2)
p.add_argument("--n", type=int, help="features in each set (default: 6,000; on a GPU 20,000)")
p.add_argument("--dim", type=int, default=2048, help="of the features (default: 2048)")
p.add_argument("--ours", type=int,
               help="measure ours, once and alone, with so many features too (default: none; on a GPU 50,000)")
p.add_argument("--only", help="run this side once and print the memory that it took, as this command's processes do")
a = start(p)
gpu = a.device.type == "cuda"
n, alone = a.n or (20000 if gpu else 6000), a.ours or (50000 if gpu else 0)

def features(n):
    mix = torch.randn(64, a.dim, generator=generator(0, "mix"))*torch.arange(1., 65)[:,None]**-.5
    def draw(what, scale):
        common = scale*torch.randn(n, 64, generator=generator(0, what))@mix
        return (common+torch.randn(n, a.dim, generator=generator(0, f"{what}, rest"))).relu_()
    return draw("samples", 1.05), draw("reference", 1.)

def dense(f, g):
    rf, rg = (torch.cdist(o, o).kthvalue(4).values for o in (f, g)) # The nearest is the feature itself
    d = torch.cdist(f, g)
    precision, recall = (d <= rg).any(1), (d <= rf[:,None]).any(0)
    return torch.stack([precision.double().mean(), recall.double().mean()]).cpu()

def ours(f, g):
    both = precision_recall(f, g, "synthetic", "synthetic", chunk=8192 if gpu else 1024)
    return torch.tensor([m.value for m in both])

f, g = (o.to(a.device) for o in features(n))
sides = {"float64": lambda: dense(f.double(), g.double()), "fp32": lambda: dense(f, g), "ours": lambda: ours(f, g)}
if a.only:
    ours(f[:8], g[:8]) # What the first call of anything loads
    print_peak(sides[a.only])

def megabytes(name):
    options = ["--device", "cpu", "--threads", a.threads, "--n", n, "--dim", a.dim, "--only", name]
    return round(peak(sides[name], a.device, options))

value, rows = {}, {}
def keep(name): value[name] = sides[name]()
times = take_turns({name: partial(keep, name) for name in sides}, a.rounds, a.device)
for name,tolerance in (("float64", 1e-6), ("fp32", 1e-3)):
    error = agree(value["ours"], value[name], tolerance, name)
    rows[f"dense, {name}"] = compare(times, name) | dict(error=error, baseline_mb=megabytes(name))
show(rows, goal=2)
mb = megabytes("ours")
used = ", ".join(f"{k} {r['baseline_mb']:,} MB" for k,r in rows.items())
print(f"memory beside the features: {used}, ours {mb:,} MB")
result = dict(rows=rows, goals={"dense, float64": 2}, n=n, dim=a.dim, precision_and_recall=value["ours"].tolist(),
              ours_mb=mb)
if alone:
    f, g = (o.to(a.device) for o in features(alone))
    out, wall, _ = timed(ours, f, g, device=a.device)
    print(f"ours alone, {alone:,} × {alone:,}: {wall:.1f} s")
    result |= dict(alone=dict(n=alone, wall_s=wall, precision_and_recall=out.tolist()))
save(a, __doc__, result)
