"""Which quantity of the latent dashboard predicts generation? Several tokenizers in small, each followed by the same LightningDiT.

    python bench/latent_predictors.py [--steps 400] [--out runs/latent-predictors] [--only NAME …] [--threads 1]

Tokenizers of 32×32 recipes (4, 8 and 16 times more latent numbers than positions, with and without VF loss), made smaller still, and one seed:
the embedded images, no GAN, equal steps for every tokenizer and for every LightningDiT. Generation is the Fréchet distance of 1,000 unguided
samples from the training images, over AlexNet and over EfficientNet-Lite0 (which is also what taught the VF loss). Quantities are of the finished
tokenizer on test images. A folder a tokenizer under --out; what is finished there is not done again, so several of these commands may share the
work with --only. Writes results/latent-predictors.json from all that is finished.
"""
import argparse, json, time
from pathlib import Path
import torch
from vavae_nb.core import atomic_write
from vavae_nb.dit.model import LightningDiT
from vavae_nb.generate import generate_images, save_grid
from vavae_nb.metrics.features import extract_features, feature_extractor
from vavae_nb.metrics.quality import FeatureStats, fd
from vavae_nb.train import configuration
from vavae_nb.training.stages import Run, provenance, run_stages

tokenizers = { # name → recipe, and what is changed in it
    "d8-none": ("cifar10-f4d8-none-b", {}), "d8-vf": ("cifar10-f4d8-lite0-b", {}),
    "d16-none": ("cifar10-f4d16-none-b", {}), "d16-vf": ("cifar10-f4d16-lite0-b", {}),
    "d32-none": ("cifar10-f4d32-none-b", {}), "d32-vf": ("cifar10-f4d32-lite0-b", {}),
    "d16-vf-nomargin": ("cifar10-f4d16-lite0-nomargin-b", {}), "d32-vf-strong": ("cifar10-f4d32-lite0-b", {"vf.weight": 1.})}
smaller = {"data.limit": 2000, "tokenizer.ch": 16, "tokenizer_training.disc_weight": 0., "dit.size": "tiny", "dit.depth": 4, "dit_training.batch_size": 16,
           "dit_training.lr": 2e-3, "dit_training.schedule": "cosine", "dit_training.ema": .98, "sampling.n": 1000, "sampling.points": 15}

def generation(run):
    "Fréchet distances of unguided samples from the training images; measured once"
    path = run.out/"generation.json"
    if path.exists(): return json.loads(path.read_text())
    tok, model, train = run.tokenizer(), LightningDiT.load(run.file("dit.safetensors", "dit")), run.data[0]
    labels = torch.arange(run.cfg.sampling.n) % model.num_classes
    x = generate_images(model, tok, labels, run.cfg.sampling, guided=False, seed=run.cfg.seed, device=run.device, precision=run.cfg.precision, batch_size=run.cfg.evaluation.batch_size)
    save_grid([x[labels == c][:12] for c in range(10)], train.classes, run.out/"samples_unguided.png")
    rows = {}
    for name in run.cfg.evaluation.extractors:
        ex = feature_extractor(name)
        stats = [FeatureStats.of(extract_features(ex, o, 100)) for o in (x, train)]
        rows[name] = fd(*stats, ex.key, f"{train.name} {train.fingerprint}", "no guidance; balanced labels; EMA weights").to_dict()
    result = dict(fd=rows, provenance=provenance(run), seconds={k: v["seconds"] for k,v in run.state.items()})
    with atomic_write(path) as tmp: tmp.write_text(json.dumps(result, indent=1))
    return result

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=400, help="of each tokenizer and of each LightningDiT (default: 400)")
    p.add_argument("--out", type=Path, default=Path("runs/latent-predictors"), help="folder of the runs (default: runs/latent-predictors)")
    p.add_argument("--only", nargs="+", default=list(tokenizers), choices=tokenizers, metavar="NAME", help=f"of {', '.join(tokenizers)} (default: all)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.only:
        recipe, change = tokenizers[name]
        start, cfg = time.time(), configuration(recipe, steps=a.steps, device="cpu", settings=smaller | change)
        for stage in ("tokenizer", "latents", "dit"): run_stages(cfg, a.out/f"{name}-{a.steps}", stage)
        values = {k: round(v["value"], 2) for k,v in generation(Run(cfg, a.out/f"{name}-{a.steps}"))["fd"].items()}
        print(f"{name}: {values} after {time.time()-start:.0f} s", flush=True)
