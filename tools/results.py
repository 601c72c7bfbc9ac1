"""results/NAME.json from finished run folders of one configuration and several seeds, and their pictures for the README.

    python tools/results.py tiny runs/tiny runs/tiny-seed=1 runs/tiny-seed=2
    python tools/results.py times make-train-fp32 runs/tiny

The second form keeps only how long the stages of one run took, and on what. Means and standard deviations over the seeds; times from the first run. Refuses runs of another configuration, data set or version.
"""
import json, shutil, statistics, sys
from pathlib import Path
from vavae_nb.recipes.settings import differences, load_config

ROOT = Path(__file__).resolve().parent.parent

def times(name, folder):
    "How long the stages of a run took on this machine"
    import torch
    run = Path(folder)
    prov = json.loads((run/"metrics.json").read_text())["provenance"]
    stages = {k: v["seconds"] for k, v in json.loads((run/"state.json").read_text()).items()}
    result = dict(command="make train", seconds=round(sum(stages.values())), stages=stages, cpu=torch.backends.cpu.get_cpu_capability()) | prov
    (ROOT/"results"/f"{name}.json").write_text(json.dumps(result, indent=1)+"\n")
    print(json.dumps(result, indent=1))

def main(name, *folders):
    runs = [Path(f) for f in folders]
    configs = [load_config(r/"config.yaml") for r in runs]
    for r,c in zip(runs, configs):
        if other := set(differences(configs[0], c))-{"seed"}: sys.exit(f"{r} differs from {runs[0]} in {sorted(other)}")
    metrics = [json.loads((r/"metrics.json").read_text()) for r in runs]
    prov = [m["provenance"] for m in metrics]
    for k in ("commit", "data", "torch", "vavae_nb", "precision"):
        if any(p[k] != prov[0][k] for p in prov): sys.exit(f"the runs differ in {k}: {[p[k] for p in prov]}")
    def entry(values, digits): return dict(mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else 0., values=values, digits=digits)
    out = {}
    for k,label,digits in (("psnr", "PSNR of {n} test images, dB", 2), ("ssim", "SSIM", 3), ("lpips", "LPIPS (VGG16)", 3)):
        out[label.format(n=metrics[0]["reconstruction"]["n"])] = entry([m["reconstruction"][k] for m in metrics], digits)
    rows = [{(f["network"], f["images"], f["against"]): f["value"] for f in m["generation"]["fd"]} for m in metrics]
    label = {"samples": "guided samples", "samples_unguided": "unguided samples", "test": "real test images"}
    for net,what,ref in rows[0]: out[f"FD over {net}: {label[what]} – {ref} images"] = entry([r[net, what, ref] for r in rows], 0)
    for k,text in (("density_cv", "t-SNE density CV"), ("knn_distance_cv", "5-NN distance CV")): out[f"{text} of {metrics[0]['uniformity']['n']} latent vectors"] = entry([m["uniformity"][k] for m in metrics], 3)
    state = json.loads((runs[0]/"state.json").read_text())
    for k,v in state.items(): out[f"stage {k}, s"] = entry([v["seconds"]], 0)
    out["of that, features of the foundation model, s"] = entry([state["tokenizer"]["feature_seconds"]], 0)
    result = dict(command="python -m vavae_nb.train --seed N", recipe=configs[0].recipe, seeds=[c.seed for c in configs], commit=prov[0]["commit"], device=prov[0]["device"],
                  threads=[p["threads"] for p in prov], torch=prov[0]["torch"], precision=prov[0]["precision"], data=prov[0]["data"], n=metrics[0]["generation"]["sampling"]["n"],
                  seconds=sum(s["seconds"] for s in state.values()), measures=out, runs=metrics)
    (ROOT/"results").mkdir(exist_ok=True); (ROOT/"nbs/images").mkdir(exist_ok=True)
    (ROOT/"results"/f"{name}.json").write_text(json.dumps(result, indent=1))
    for picture in ("reconstructions", "samples", "nearest"): shutil.copy(runs[0]/f"{picture}.png", ROOT/"nbs/images"/f"{name}-{picture}.png")
    for k,v in out.items(): print(f"{k:70} {v['mean']:9.3f} ± {v['std']:.3f}")

if __name__ == "__main__":
    if len(sys.argv) < 3: sys.exit(__doc__)
    if sys.argv[1] == "times": times(*sys.argv[2:])
    else: main(*sys.argv[1:])
