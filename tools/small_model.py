"""The small trained model that the package ships, from a finished run: averaged weights in float16, and their origin.

    python -m vavae_nb.ablations table2 --scale cpu --rows f4d16-lite0-b
    python tools/small_model.py runs/ablations/cpu/f4d16-lite0-b-0-…

Writes small_tokenizer.safetensors, small_dit.safetensors and small_model.json into vavae_nb/embedded, or where a
second argument says. The run is measured as it was; what rounding to float16 changes is measured here.
"""
import json, sys
from pathlib import Path
import torch
from vavae_nb.paper.tables import configuration, tables
from vavae_nb.paper.runs import run_folder
from vavae_nb.recipes.config import flat
from vavae_nb.recipes.settings import load_config
from vavae_nb.base.files import atomic_write, sha256_file
from vavae_nb.data.images import embedded
from vavae_nb.metrics.reconstruction import evaluate_reconstruction
from vavae_nb.sampling.drawing import class_labels, generate_images, load_pair
from vavae_nb.base.tensor_files import load_tensors, save_tensors

ROOT = Path(__file__).resolve().parent.parent

def command(run, cfg):
    "What makes this very run"
    for table in tables.values():
        for row in table.rows:
            if run_folder(row, configuration(row, "cpu", cfg.seed), "cpu", "").name != run.name: continue
            name = row.name_at("cpu")
            return f"python -m vavae_nb.ablations {row.table} --scale cpu --rows {name} --seeds {cfg.seed+1}"
    return "python -m vavae_nb.train --recipe config.yaml, with the settings below"

def draw(model, tok, cfg):
    labels = class_labels("balanced", 20, model.num_classes)
    return generate_images(model, tok, labels, cfg.sampling, seed=cfg.seed, precision="fp32", progress=False)

def psnr(tok):
    found = evaluate_reconstruction(tok, embedded("test"), lpips="none").figures
    return next(f["value"] for f in found if f["metric"] == "psnr")

def save_small(model, tok, run, dit_file, tok_file):
    "Both networks in float16, of LightningDiT the averaged weights alone"
    stats = tok.latent_mean, tok.latent_std, tok.latent_how
    tok.half().set_latent_stats(*stats) # In float32, and of these weights
    tok.save(tok_file, load_tensors(run/"tokenizer.safetensors")[1]["meta"])
    model.half().save(dit_file, model.meta | dict(tokenizer=tok.fingerprint()), ema=model.state_dict())
    tensors, head = load_tensors(dit_file)
    save_tensors(dit_file, {k: v for k,v in tensors.items() if k.startswith("ema.")}, head)

def main(run, to=ROOT/"vavae_nb"/"embedded"):
    run, to = Path(run), Path(to)
    if not (run/"metrics.json").exists(): sys.exit(f"{run} is not a finished run: it has no metrics.json")
    cfg, m = load_config(run/"config.yaml"), json.loads((run/"metrics.json").read_text(encoding="utf-8"))
    tok_file, dit_file = files = to/"small_tokenizer.safetensors", to/"small_dit.safetensors"
    model, tok, _ = load_pair(run/"dit.safetensors", run/"tokenizer.safetensors")
    images, psnr_before = draw(model, tok, cfg), psnr(tok)
    save_small(model, tok, run, dit_file, tok_file)
    model, tok, _ = load_pair(dit_file, tok_file)
    changed = torch.as_tensor(draw(model, tok, cfg)).float()-torch.as_tensor(images).float()
    fd = [{k: r[k] for k in ("images", "against", "network", "value", "n", "note")} for r in m["generation"]["fd"]]
    measured = dict(reconstruction=m["reconstruction"], uniformity=m["uniformity"],
                    sampling=m["generation"]["sampling"], fd=fd)
    rounding = dict(dtype="float16 on disk, float32 in memory",
                    psnr_of_test_images=dict(before=psnr_before, after=psnr(tok)), samples=len(images),
                    mean_difference_of_samples=changed.abs().mean().item(),
                    largest_difference_of_samples=changed.abs().max().item(), unit="of 255")
    about = dict(command=[command(run, cfg), f"python tools/small_model.py runs/ablations/cpu/{run.name}"],
                 seed=cfg.seed, run=run.name, provenance=m["provenance"], measured_before_rounding=measured,
                 rounding=rounding, files={f.name: dict(bytes=f.stat().st_size, sha256=sha256_file(f)) for f in files},
                 config=flat(cfg))
    with atomic_write(to/"small_model.json") as tmp:
        tmp.write_text(json.dumps(about, indent=1, default=vars)+"\n", encoding="utf-8")
    sizes = ", ".join(f"{f.name} {f.stat().st_size/1e6:.2f} MB" for f in files)
    print(f"{sizes}; {json.dumps(rounding)}")

if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3: sys.exit(__doc__)
    main(*sys.argv[1:])
