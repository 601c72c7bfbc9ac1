"""Which quantity of the latent dashboard predicts generation? Small tokenizers, each with the same LightningDiT.

    python bench/latent_predictors.py [--steps 400] [--seed 0] [--out runs/latent-predictors] [--only NAME …]
        [--threads 1]

Tokenizers of 32×32 recipes with 8, 16 and 32 channels, with and without VF loss, made smaller still (`smaller` below):
2,000 of the embedded images, no GAN, equal steps for every tokenizer and for every LightningDiT. Generation is the
Fréchet distance of 1,000 unguided samples from the training images, over AlexNet and over EfficientNet-Lite0 (which is
also what taught the VF loss). Quantities are of the finished tokenizer on the 1,000 embedded test images. Each
tokenizer and seed has a folder under --out; what is finished there is not done again, so several of these commands may
share the work with --only. Rank correlations are over tokenizers (means over the seeds that all of them have); their
p-values come from all permutations, for one quantity by itself and for the best of all of them. Writes
results/latent-predictors.json from all that is finished.
"""
import argparse, itertools, json, time
from pathlib import Path
import numpy as np, torch
from scipy.stats import rankdata
from vavae_nb.recipes.settings import load_config
from vavae_nb.base.files import atomic_write
from vavae_nb.dit.model import LightningDiT
from vavae_nb.sampling.drawing import generate_images
from vavae_nb.sampling.pictures import save_grid
from vavae_nb.sampling.sets import versions
from vavae_nb.metrics.features import extract_features, feature_extractor
from vavae_nb.metrics.quality import FeatureStats, fd
from vavae_nb.tokenizer.foundation import FoundationModel, cached_features
from vavae_nb.train import configuration
from vavae_nb.training.dashboard import probe_images, tokenizer_report
from vavae_nb.training.report import provenance
from vavae_nb.training.run import Run
from vavae_nb.training.stages import run_stages

tokenizers = { # name → recipe, and what is changed in it
    "d8-none": ("cifar10-f4d8-none-b", {}), "d8-vf": ("cifar10-f4d8-lite0-b", {}),
    "d16-none": ("cifar10-f4d16-none-b", {}), "d16-vf": ("cifar10-f4d16-lite0-b", {}),
    "d32-none": ("cifar10-f4d32-none-b", {}), "d32-vf": ("cifar10-f4d32-lite0-b", {}),
    "d16-vf-nomargin": ("cifar10-f4d16-lite0-nomargin-b", {}),
    "d32-vf-strong": ("cifar10-f4d32-lite0-b", {"vf.weight": 1.})}
smaller = {"data.limit": 2000, "tokenizer.ch": 16, "tokenizer_training.disc_weight": 0., "dit.size": "tiny",
           "dit.depth": 4, "dit_training.batch_size": 16, "dit_training.lr": 2e-3, "dit_training.schedule": "cosine",
           "dit_training.ema": .98, "sampling.n": 1000, "sampling.points": 15}

def generation(run):
    "Fréchet distances of unguided samples from the training images; measured once"
    path = run.out/"generation.json"
    if path.exists(): return json.loads(path.read_text(encoding="utf-8"))
    tok, model, train = run.tokenizer(), LightningDiT.load(run.file("dit.safetensors", "dit")), run.data[0]
    labels = torch.arange(run.cfg.sampling.n) % model.num_classes
    x = generate_images(model, tok, labels, run.cfg.sampling, guided=False, seed=run.cfg.seed, device=run.device,
                        precision=run.cfg.precision, batch_size=run.cfg.evaluation.batch_size)
    save_grid([x[labels == c][:12] for c in range(10)], train.classes, run.out/"samples_unguided.png")
    rows = {}
    for name in run.cfg.evaluation.extractors:
        ex = feature_extractor(name)
        stats = [FeatureStats.of(extract_features(ex, o, 100)) for o in (x, train)]
        reference, note = f"{train.name} {train.fingerprint}", "no guidance; balanced labels; EMA weights"
        rows[name] = fd(*stats, ex.key, reference, note).to_dict()
    seconds = {stage: about["seconds"] for stage,about in run.state.items()}
    result = dict(fd=rows, provenance=provenance(run) | dict(commit=commit), seconds=seconds)
    with atomic_write(path) as tmp: tmp.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result

def quantities(run):
    "What the dashboard would say about the finished tokenizer; alignment is always with EfficientNet-Lite0"
    images, tok = probe_images(run.data[1]), run.tokenizer()
    vfm = FoundationModel("efficientnet_lite0", grid=images.size//tok.downsampling)
    features = cached_features(vfm, images)[:, 0]
    values = tokenizer_report(tok, images, torch.from_numpy(np.array(features)), seed=run.cfg.seed)
    return dict(latent_dim=tok.latent_dim) | {k: v for k,v in values.items() if "/" not in k}

def rank_correlations(x, y):
    "Spearman's ρ of each row of x, (k, n), with y, (n,); exact two-sided p-values of each, and of the largest of the k"
    def unit(ranks):
        centred = ranks-ranks.mean(-1, keepdims=True)
        return centred/np.linalg.norm(centred, axis=-1, keepdims=True).clip(1e-12)
    x, y = unit(rankdata(x, axis=1)), unit(rankdata(y))
    rho, null = x@y, np.abs(y[permutations(len(y))]@x.T) # (k,), (permutations, k)
    def at_least(values): return (values >= np.abs(rho)-1e-9).mean(0)
    return rho, at_least(null), at_least(null.max(1, keepdims=True))

def permutations(n):
    "All of them, or 40,000"
    if n <= 8: return np.array(list(itertools.permutations(range(n))))
    return np.array([np.random.default_rng(i).permutation(n) for i in range(40_000)])

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--steps", type=int, default=400, help="of each tokenizer and of each LightningDiT (default: 400)")
p.add_argument("--seed", type=int, default=0, help="of everything random in this command's runs (default: 0)")
p.add_argument("--out", type=Path, default=Path("runs/latent-predictors"),
               help="folder of the runs (default: runs/latent-predictors)")
p.add_argument("--only", nargs="*", default=list(tokenizers), choices=tokenizers, metavar="NAME",
               help=f"of {', '.join(tokenizers)} (default: all; nothing: only gather what is finished)")
p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
a = p.parse_args()
torch.set_num_threads(a.threads)
commit = versions(torch.device("cpu"))["commit"] # Of the code that was loaded; hours later another may be checked out

def folder(name, seed): return a.out/(f"{name}-{a.steps}-seed{seed}" if seed else f"{name}-{a.steps}")

for name in a.only:
    recipe, change = tokenizers[name]
    start = time.time()
    cfg = configuration(recipe, seed=a.seed, steps=a.steps, device="cpu", settings=smaller | change)
    for stage in ("tokenizer", "latents", "dit"): run_stages(cfg, folder(name, a.seed), stage)
    values = {k: round(v["value"], 2) for k,v in generation(Run(cfg, folder(name, a.seed)))["fd"].items()}
    print(f"{name}: {values} after {time.time()-start:.0f} s", flush=True)

rows = []
for name,seed in itertools.product(tokenizers, range(10)):
    out = folder(name, seed)
    if not (out/"generation.json").exists(): continue
    run, (recipe, changes) = Run(load_config(out/"config.yaml"), out), tokenizers[name]
    about = dict(name=name, recipe=recipe, changes=changes, seed=seed, quantities=quantities(run))
    rows.append(about | generation(run))
    print(name, seed, {k: round(v, 3) for k,v in rows[-1]["quantities"].items()}, flush=True)
by_name = {}
for r in rows: by_name.setdefault(r["name"], []).append(r)
# Those that every tokenizer has; others only say how much a seed moves a distance
seeds = sorted(set.intersection(*({r["seed"] for r in same} for same in by_name.values())))

def means(get):
    "Of each tokenizer, over these seeds"
    return np.array([np.mean([get(r) for r in same if r["seed"] in seeds]) for same in by_name.values()])

correlations, spread, known = {}, {}, list(rows[0]["quantities"])
x = np.stack([means(lambda r: r["quantities"][k]) for k in known])
for net in rows[0]["fd"]:
    found = rank_correlations(x, means(lambda r: r["fd"][net]["value"]))
    correlations[net] = {k: dict(rho=float(rho), p=float(p), p_best=float(best)) for k,rho,p,best in zip(known, *found)}
    for k,v in correlations[net].items():
        print(f"{net:20}{k:18} rho {v['rho']:+.2f}, p {v['p']:.3f}, as the best of {len(known)} {v['p_best']:.3f}")
    spread[net] = {name: [r["fd"][net]["value"] for r in same] for name,same in by_name.items() if len(same) > 1}
result = dict(command=f"python bench/latent_predictors.py --steps {a.steps}", what=__doc__.splitlines()[0],
              n=len(by_name), steps=a.steps, smaller=smaller, correlations=correlations, seeds=seeds,
              fd_by_seed=spread, rows=rows, commit=commit)
with atomic_write("results/latent-predictors.json") as tmp:
    tmp.write_text(json.dumps(result, indent=1), encoding="utf-8")
