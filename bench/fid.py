"""FID: the Fréchet step of 2048-dimensional features, and the Inception features themselves, against torch-fidelity and scipy's matrix root.

    python bench/fid.py [--images 64] [--dim 2048] [--rounds 2]

Fréchet step, from means and covariances of 10,000 features each (float64, made once, outside the time): baselines are `scipy.linalg.sqrtm` of the
product of the covariances, as clean-fid and pytorch-fid take it, and its eigenvalues by `numpy.linalg.eigvals`, as torch-fidelity 0.4 does (a row
of its own); ours is `frechet_distance`. The features are synthetic, with a falling spectrum as real ones have. Values must agree to 1e-6.
Features: torch-fidelity's module, filled with the packaged weights, against `extract_features`, on the same 8-bit images in the same batches, from
memory (without its loader's processes, which take longer to start than these images take). A GPU takes 10,000 images, the CPU a few; features
must agree to 1e-4. Writes results/bench-fid.json.
"""
import numpy as np, torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_statistics_to_metric
from common import agree, compare, options, save, show, start, take_turns
from vavae_nb.metrics.features import extract_features, feature_extractor
from vavae_nb.metrics.quality import FeatureStats, frechet_distance
from vavae_nb.base.pretrained import inception_network
from vavae_nb.base.tensors import generator

p = options(__doc__, rounds=2)
p.add_argument("--images", type=int, help="whose features are taken (default: 64; on a GPU 10,000)")
p.add_argument("--size", type=int, default=256, help="of the images, pixels (default: 256)")
p.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
p.add_argument("--dim", type=int, default=2048, help="of the features in the Fréchet step (default: 2048)")
a = start(p)
images = a.images or (10000 if a.device.type == "cuda" else 64)

def stats(n, what):
    g, scale = generator(0, what), torch.arange(1., a.dim+1)**-.8
    mix, s = torch.randn(a.dim, a.dim, generator=generator(0, "mix"))/a.dim**.5, FeatureStats()
    for part in range(0, n, 5000): s.update((torch.randn(min(5000, n-part), a.dim, generator=g)*scale@mix).abs()*(1.05 if what == "samples" else 1))
    return s

samples, reference = stats(10000, "samples"), stats(10000, "reference")
(m1, c1), (m2, c2) = ((s.mean.numpy(), s.cov.numpy()) for s in (samples, reference))
sides = {"torch-fidelity": lambda: fid_statistics_to_metric(dict(mu=m1, sigma=c1), dict(mu=m2, sigma=c2), verbose=False)["frechet_inception_distance"],
         "sqrtm": lambda: float(((m1-m2)**2).sum()+np.trace(c1)+np.trace(c2)-2*np.trace(sqrtm(c1@c2).real)), "ours": lambda: frechet_distance(samples, reference)}
value = {}
def keep(k): value[k] = sides[k]()
times = take_turns({k: lambda k=k: keep(k) for k in sides}, a.rounds)
errors = {k: agree(torch.tensor(value["ours"]), torch.tensor(value[k]), 1e-6, f"the distance beside {k}") for k in ("sqrtm", "torch-fidelity")}
rows = {f"Fréchet step, {k}": compare(times, k) | dict(rel_err=errors[k]) for k in errors}
show(rows, goal=5)

pixels = torch.randint(0, 256, (images, a.size//8, a.size//8, 3), generator=generator(0, "pixels"), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
chw, net, ours = pixels.permute(0, 3, 1, 2).contiguous(), inception_network()[0].to(a.device), feature_extractor("inception").to(a.device)
sides = dict(baseline=lambda: torch.cat([net(x.to(a.device))[0].cpu() for x in chw.split(a.batch)]), ours=lambda: torch.from_numpy(extract_features(ours, pixels, a.batch)))
rel_err = agree(sides["ours"](), sides["baseline"](), 1e-4, "the features")
rows["features"] = compare(take_turns(sides, a.rounds, a.device)) | dict(images=images, size=a.size, batch=a.batch, rel_err=rel_err)
show({"features": rows["features"]}, goal=1)
save(a, __doc__, dict(rows=rows, goals={"Fréchet step, sqrtm": 5, "features": 1}, dim=a.dim, n=samples.n, n_reference=reference.n, distances=value))
