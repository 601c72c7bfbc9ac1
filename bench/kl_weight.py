"""Which KL weight gives a tokenizer without VF loss the latent variance of one with it? For the ablations' `kl…`.

    python bench/kl_weight.py [--weights 1e-4 1e-3 1e-2] [--scale cpu] [--seed 0]

Trains the tokenizer of row f4d32-none-b of Table 2 with each KL weight, and that with VF loss, and says which comes
nearest: the divergence pulls the variance towards 1, so none may come near.
Tokenizers are those of `python -m vavae_nb.ablations`, in its folder: what is finished there is not done again. Writes
results/kl-weight.json.
"""
import argparse, json
import torch
from vavae_nb.paper.tables import configuration, tables
from vavae_nb.paper.runs import shared_tokenizer
from vavae_nb.recipes.settings import override
from vavae_nb.base.files import atomic_write
from vavae_nb.sampling.sets import versions
from vavae_nb.tokenizer.autoencoder import Autoencoder

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--weights", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2],
               help="KL weights (default: 1e-4 1e-3 1e-2)")
p.add_argument("--scale", default="cpu", help="scale of the runs (default: cpu)")
p.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
p.add_argument("--runs", default="runs/ablations", help="folder of the runs (default: runs/ablations)")
a = p.parse_args()
commit = versions(torch.device("cpu"))["commit"] # Of the code that was loaded
rows = {row.name: row for row in tables["controls"].rows}
none = configuration(rows["f16d64-none-b"], a.scale, a.seed)
cases = {"vf": configuration(rows["f16d64-dinov2-b"], a.scale, a.seed)}
for weight in (none.tokenizer_training.kl_weight, *a.weights):
    cases[f"{weight:g}"] = override(none, {"tokenizer_training.kl_weight": weight})
std = {}
for name,cfg in cases.items():
    tok = Autoencoder.load(shared_tokenizer(cfg, a.scale, a.runs)/"tokenizer.safetensors")
    std[name] = tok.latent_std.square().mean().sqrt().item()
    print(f"{name}: std of the latent {std[name]:.4f}", flush=True)
nearest = min((k for k in std if k != "vf"), key=lambda k: abs(std[k]-std["vf"]))
print(f"nearest to {std['vf']:.4f}: a KL weight of {nearest} with {std[nearest]:.4f}")
weights = " ".join(f"{weight:g}" for weight in a.weights)
command = f"python bench/kl_weight.py --scale {a.scale} --seed {a.seed} --weights {weights}"
result = dict(command=command, std=std, nearest=float(nearest)) | versions(torch.device("cpu")) | dict(commit=commit)
with atomic_write("results/kl-weight.json") as tmp:
    tmp.write_text(json.dumps(result, indent=1)+"\n", encoding="utf-8")
