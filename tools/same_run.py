"""Does another state of the code give the same numbers? A small whole run, and every number in what it leaves.

    python tools/same_run.py make FOLDER [--code CHECKOUT]   the run, by the code of a checkout (default: this one)
    python tools/same_run.py compare FOLDER OTHER            what differs between two of them; exit 1 if anything does

Two tokenizer phases with a GAN and VF loss, latents, LightningDiT, guided samples and metrics: fp32, one thread, a
minute. Compared are tensors, arrays and pixels bit for bit, the log's and the metrics' numbers as text; not times,
speeds, memory, commits and versions. Two processors need not agree; one processor agrees with itself.
"""
import argparse, csv, json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = "[{steps: 4, vf_weight: 0.5, cos_margin: 0, distmat_margin: 0}, {steps: 4, disc_start: 2}]"
SETTINGS = ["precision=fp32", f"tokenizer_training.phases={PHASES}", "tokenizer_training.lpips_every=2",
            "vf.adaptive_every=2", "saving.every=3", "saving.log_every=1", "dit_training.ema=.9"]
VARIES = ("seconds", "feature_seconds", "commit", "versions", "images_per_second", "memory_gb", "mfu")


def make(folder, code):
    "The run; its output is shown"
    env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vavae_nb.train", "--recipe", "smoke", "--device", "cpu", "--out", folder]
    return subprocess.run([*command, "--set", *SETTINGS], env=env, cwd=code).returncode


def tensors(path):
    "Name → bytes of a safetensors file"
    from safetensors import safe_open
    with safe_open(path, "np") as f: return {k: f.get_tensor(k).tobytes() for k in f.keys()}


def arrays(path):
    "Name → bytes of an .npz or .npy file"
    import numpy as np
    found = np.load(path)
    return {k: found[k].tobytes() for k in found} if path.suffix == ".npz" else {"": found.tobytes()}


def pixels(path):
    "The pixels of a picture"
    from PIL import Image
    return {"": Image.open(path).convert("RGB").tobytes()}


def numbers(o, prefix=""):
    "Path → value of what JSON says, without what varies"
    if isinstance(o, dict): items = o.items()
    elif isinstance(o, list): items = enumerate(o)
    else: return {prefix: o}
    out = {}
    for k,v in items:
        if k not in VARIES: out |= numbers(v, f"{prefix}/{k}")
    return out


def log(path):
    "(stage, step, term) → value"
    with open(path, newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    return {(r["stage"], r["step"], r["term"]): r["value"] for r in rows if r["term"] not in VARIES}


READERS = {".safetensors": tensors, ".npz": arrays, ".npy": arrays, ".png": pixels, ".csv": log,
           ".json": lambda p: numbers(json.loads(p.read_text(encoding="utf-8")))}
CHARTS = ("curves.png", "dashboard.png", "tsne.png") # Drawn from times and by matplotlib; their numbers are compared


def contents(folder):
    "(file, name) → content"
    out = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix not in READERS or path.name in CHARTS or not path.is_file(): continue
        name = path.relative_to(folder).as_posix()
        out |= {(name, k): v for k,v in READERS[path.suffix](path).items()}
    return out


def compare(a, b):
    "The names of what differs"
    a, b = contents(a), contents(b)
    return [k for k in sorted(a.keys() | b.keys(), key=str) if a.get(k) != b.get(k)], len(a)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("make", "compare"))
    p.add_argument("folder")
    p.add_argument("other", nargs="?")
    p.add_argument("--code", default=ROOT, type=Path)
    a = p.parse_args()
    if a.action == "make": sys.exit(make(Path(a.folder).absolute(), a.code.absolute()))
    differing, n = compare(a.folder, a.other)
    for name in differing[:40]: print("differs:", *name)
    print(f"{len(differing)} of {n} differ")
    sys.exit(bool(differing))
