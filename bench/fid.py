"""FID: the Fréchet step of 2048 dimensions, and the Inception features, against torch-fidelity and scipy's matrix root.

    python bench/fid.py [--images 64] [--dim 2048] [--rounds 2]

Fréchet step, from means and covariances of 10,000 features each (float64, made once, outside the time): baselines are
`scipy.linalg.sqrtm` of the product of the covariances, as clean-fid and pytorch-fid take it, and its eigenvalues by
`numpy.linalg.eigvals`, as torch-fidelity 0.4 does (a row of its own); ours is `frechet_distance`. The features are
synthetic, with a falling spectrum as real ones have. Values must agree to 1e-6. Features: torch-fidelity's module,
filled with the packaged weights, against `extract_features`, on the same 8-bit images in the same batches, from memory
(without its loader's processes, which take longer to start than these images take). A GPU takes 10,000 images, the CPU
a few; features must agree to 1e-4. Writes results/bench-fid.json.
"""
from functools import partial
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
    g, s, scale = generator(0, what), FeatureStats(), torch.arange(1., a.dim+1)**-.8
    mix = torch.randn(a.dim, a.dim, generator=generator(0, "mix"))/a.dim**.5
    for part in range(0, n, 5000):
        features = (torch.randn(min(5000, n-part), a.dim, generator=g)*scale@mix).abs()
        s.update(features*(1.05 if what == "samples" else 1))
    return s

samples, reference = stats(10000, "samples"), stats(10000, "reference")
(m1, c1), (m2, c2) = ((s.mean.numpy(), s.cov.numpy()) for s in (samples, reference))
def torch_fidelity():
    distance = fid_statistics_to_metric(dict(mu=m1, sigma=c1), dict(mu=m2, sigma=c2), verbose=False)
    return distance["frechet_inception_distance"]
def root(): return float(((m1-m2)**2).sum()+np.trace(c1)+np.trace(c2)-2*np.trace(sqrtm(c1@c2).real))
def ours(): return frechet_distance(samples, reference)

value = {}
def keep(name, f): value[name] = f()
sides = {"torch-fidelity": torch_fidelity, "sqrtm": root, "ours": ours}
times = take_turns({name: partial(keep, name, f) for name,f in sides.items()}, a.rounds)
rows = {}
for name in ("sqrtm", "torch-fidelity"):
    error = agree(torch.tensor(value["ours"]), torch.tensor(value[name]), 1e-6, f"the distance beside {name}")
    rows[f"Fréchet step, {name}"] = compare(times, name) | dict(rel_err=error)
show(rows, goal=5)

small = (images, a.size//8, a.size//8, 3)
pixels = torch.randint(0, 256, small, generator=generator(0, "pixels"), dtype=torch.uint8)
pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)
chw = pixels.permute(0, 3, 1, 2).contiguous()
their_net, our_net = inception_network()[0].to(a.device), feature_extractor("inception").to(a.device)
def their_features(): return torch.cat([their_net(x.to(a.device))[0].cpu() for x in chw.split(a.batch)])
def our_features(): return torch.from_numpy(extract_features(our_net, pixels, a.batch))
rel_err = agree(our_features(), their_features(), 1e-4, "the features")
times = take_turns(dict(baseline=their_features, ours=our_features), a.rounds, a.device)
rows["features"] = compare(times) | dict(images=images, size=a.size, batch=a.batch, rel_err=rel_err)
show({"features": rows["features"]}, goal=1)
save(a, __doc__, dict(rows=rows, goals={"Fréchet step, sqrtm": 5, "features": 1}, dim=a.dim, n=samples.n,
                      n_reference=reference.n, distances=value))
