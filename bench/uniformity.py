"""Density and uniformity of 10,000 vectors: against scipy's gaussian_kde and scikit-learn's t-SNE with their defaults.

    python bench/uniformity.py [--n 10000] [--runs 2] [--threads 2] [--rounds 1]

KDE: `kde_at_points` against `scipy.stats.gaussian_kde`, both exact, at the same points in the plane; they must agree to
1e-10, relatively and point by point. The whole: `uniformity` of so many runs, against as many times scikit-learn's
t-SNE (defaults, which use every core), gaussian_kde and the same measures, on the same vectors. Both are t-SNE of
scikit-learn with a PCA start; ours keeps each run to one thread, which makes it repeatable, and has a run on each core.
The number of threads changes the order of sums and so the layout: the mean density CV must agree within three standard
errors of the difference, by the spread over runs (with two runs or more). Writes results/bench-uniformity.json.
"""
import math, os
from functools import partial
import numpy as np, torch
from scipy.stats import gaussian_kde
from sklearn.manifold import TSNE
from common import compare, options, save, show, start, take_turns
from vavae_nb.metrics.uniformity import density_cv, gini, kde_at_points, latent_vectors, normalised_entropy, uniformity
from vavae_nb.base.tensors import generator

p = options(__doc__, rounds=1)
p.add_argument("--n", type=int, default=10000, help="vectors (default: 10000)")
p.add_argument("--runs", type=int, default=2, help="runs of the whole, of the published 10 (default: 2)")
a = start(p)
points = torch.randn(a.n, 2, generator=generator(0, "points"), dtype=torch.float64)*torch.tensor([30., 20.])

def scipys(y):
    y = y.double().T.numpy()
    return torch.from_numpy(gaussian_kde(y)(y))

error = (kde_at_points(points)/scipys(points)-1).abs().max().item()
assert error < 1e-10, f"densities differ by {error:.1e}"
sides = dict(baseline=partial(scipys, points), ours=partial(kde_at_points, points))
rows = {"KDE": compare(take_turns(sides, max(5, a.rounds))) | dict(rel_err=error)}
show(rows, goal=3)

latents, out = torch.randn(a.n, 32, 2, 2, generator=generator(0, "latents")), {}
latents[:, :8] *= 1+latents[:, 8:16].abs() # Not quite noise

def theirs():
    measures = []
    for run in range(a.runs):
        v = latent_vectors(latents, a.n, generator(run, "uniformity")).numpy()
        layout = TSNE(init="pca", learning_rate="auto", random_state=run).fit_transform(v)
        density = scipys(torch.from_numpy(layout))
        measures.append([f(density) for f in (density_cv, gini, normalised_entropy)])
    out["baseline"] = np.array(measures)

def ours(): out["ours"] = uniformity(latents, a.n, a.runs)
rows["uniformity"] = compare(take_turns(dict(baseline=theirs, ours=ours), a.rounds, warm=True))
found = {}
for name,values in zip(("density_cv", "gini", "normalised_entropy"), out["baseline"].T):
    found[name] = dict(baseline=values.mean(), ours=out["ours"][name])
if a.runs > 1:
    baseline_std = out["baseline"][:, 0].std(ddof=1)
    both = found["density_cv"] | dict(baseline_std=baseline_std, ours_std=out["ours"]["density_cv_std"])
    # A hundredth: two runs can be alike by chance
    allowed = 3*math.hypot(both["baseline_std"], both["ours_std"], .01)/a.runs**.5
    assert abs(both["ours"]-both["baseline"]) < allowed, both
    found["density_cv"] = both
show({"uniformity": rows["uniformity"]}, goal=5)
print({k: {w: round(float(x), 4) for w,x in v.items()} for k,v in found.items()})
save(a, __doc__, dict(rows=rows, goals={"KDE": 3, "uniformity": 5}, n=a.n, runs=a.runs, cores=os.cpu_count(),
                      found=found))
