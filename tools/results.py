"""results/NAME.json from finished run folders of one configuration and several seeds, and their pictures.

    python tools/results.py tiny runs/tiny runs/tiny-seed=1 runs/tiny-seed=2
    python tools/results.py times make-train-fp32 runs/tiny

Means and standard deviations are over the seeds, times of the first run. Runs of another configuration, data set or
version are refused. The second form keeps only how long the stages of one run took, and on what.
"""
import json, shutil, statistics, sys
from pathlib import Path
from vavae_nb.recipes.settings import differences, load_config

ROOT = Path(__file__).resolve().parent.parent

def read(path): return json.loads(path.read_text(encoding="utf-8"))
def write(name, result, end="\n"):
    (ROOT/"results"/f"{name}.json").write_text(json.dumps(result, indent=1)+end, encoding="utf-8")

def times(name, folder):
    "How long the stages of a run took on this machine"
    import torch
    run = Path(folder)
    stages = {stage: about["seconds"] for stage,about in read(run/"state.json").items()}
    result = dict(command="make train", seconds=round(sum(stages.values())), stages=stages,
                  cpu=torch.backends.cpu.get_cpu_capability()) | read(run/"metrics.json")["provenance"]
    write(name, result)
    print(json.dumps(result, indent=1))

def refuse_mixtures(runs, configs, provenances):
    for r,c in zip(runs, configs):
        if other := set(differences(configs[0], c))-{"seed"}: sys.exit(f"{r} differs from {runs[0]} in {sorted(other)}")
    for k in ("commit", "data", "torch", "vavae_nb", "precision"):
        values = [p[k] for p in provenances]
        if any(v != values[0] for v in values): sys.exit(f"the runs differ in {k}: {values}")

def entry(values, digits):
    std = statistics.stdev(values) if len(values) > 1 else 0.
    return dict(mean=statistics.mean(values), std=std, values=values, digits=digits)

def measures(metrics, state):
    "Mean and standard deviation over the runs, by what was measured; times of the first run"
    first, out = metrics[0], {}
    def add_all(label, section, key, digits): out[label] = entry([m[section][key] for m in metrics], digits)
    add_all(f"PSNR of {first['reconstruction']['n']} test images, dB", "reconstruction", "psnr", 2)
    add_all("SSIM", "reconstruction", "ssim", 3)
    add_all("LPIPS (VGG16)", "reconstruction", "lpips", 3)
    rows = [{(f["network"], f["images"], f["against"]): f["value"] for f in m["generation"]["fd"]} for m in metrics]
    names = {"samples": "guided samples", "samples_unguided": "unguided samples", "test": "real test images"}
    for network,images,against in rows[0]:
        values = [r[network, images, against] for r in rows]
        out[f"FD over {network}: {names[images]} – {against} images"] = entry(values, 0)
    vectors = f"{first['uniformity']['n']} latent vectors"
    add_all(f"t-SNE density CV of {vectors}", "uniformity", "density_cv", 3)
    add_all(f"5-NN distance CV of {vectors}", "uniformity", "knn_distance_cv", 3)
    for stage,about in state.items(): out[f"stage {stage}, s"] = entry([about["seconds"]], 0)
    out["of that, features of the foundation model, s"] = entry([state["tokenizer"]["feature_seconds"]], 0)
    return out

def main(name, *folders):
    runs = [Path(f) for f in folders]
    configs = [load_config(r/"config.yaml") for r in runs]
    metrics, state = [read(r/"metrics.json") for r in runs], read(runs[0]/"state.json")
    provenances = [m["provenance"] for m in metrics]
    refuse_mixtures(runs, configs, provenances)
    first, out = provenances[0], measures(metrics, state)
    result = dict(
        command="python -m vavae_nb.train --seed N", recipe=configs[0].recipe, seeds=[c.seed for c in configs],
        commit=first["commit"], device=first["device"], threads=[p["threads"] for p in provenances],
        torch=first["torch"], precision=first["precision"], data=first["data"],
        n=metrics[0]["generation"]["sampling"]["n"], seconds=sum(about["seconds"] for about in state.values()),
        measures=out, runs=metrics)
    (ROOT/"results").mkdir(exist_ok=True)
    write(name, result, end="")
    pictures = ROOT/"nbs"/"images"
    pictures.mkdir(exist_ok=True)
    for picture in ("reconstructions", "samples", "nearest"):
        shutil.copy(runs[0]/f"{picture}.png", pictures/f"{name}-{picture}.png")
    for label,v in out.items(): print(f"{label:70} {v['mean']:9.3f} ± {v['std']:.3f}")

if __name__ == "__main__":
    if len(sys.argv) < 3: sys.exit(__doc__)
    if sys.argv[1] == "times": times(*sys.argv[2:])
    else: main(*sys.argv[1:])
