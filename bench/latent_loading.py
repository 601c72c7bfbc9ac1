"""Shuffled batches of latents from memory-mapped shards, against opening the shard for every sample.

    python bench/latent_loading.py [--rounds 5] [--threads 1]

Baseline: a data set that opens its safetensors file for each sample and reads one row (as the published system's data set does), normalises
it, and stacks a batch of them. Ours: `Latents.batch`. The same shards in the published shape (32×16×16, float32, both flips; random numbers),
the same shuffled indices and flips, results compared in the same run; the two take turns after a warm-up, so that both read from the page
cache, and the ratio is of medians of CPU time, which other work on the machine disturbs less than wall time; both times are in the result.
Memory is the process's own (RssAnon) and that of mapped files (RssFile), before and after reading all. Writes results/bench-latent-loading.json.
"""
import argparse, json, statistics, subprocess, tempfile, time
from pathlib import Path
import torch
from safetensors import safe_open
from vavae_nb.latents import Latents, open_shard, shard_files
from vavae_nb.tensors import generator, save_tensors

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--rounds", type=int, default=5, help="timed pairs (default: 5)")
p.add_argument("--batches", type=int, nargs="+", default=[64, 256, 900, 1024], help="samples a batch (default: 64 256 900 1024; 1024 of them are 34 MB)")
p.add_argument("--shards", type=int, default=8, help="shards of 1,000 images (default: 8, which is 0.5 GB)")
p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
a = p.parse_args()

torch.set_num_threads(a.threads)
PER, g = 1000, generator(0, "bench")
tmp = tempfile.TemporaryDirectory()
for s in range(a.shards):
    z = torch.randn(2, PER, 32, 16, 16, generator=g)
    save_tensors(Path(tmp.name)/f"latents_rank00_shard{s:03d}.safetensors", dict(latents=z[0], latents_flip=z[1], labels=torch.arange(PER) % 10))
del z
files, n, mean, std = shard_files(tmp.name), PER*a.shards, torch.full((1, 32, 1, 1), .1), torch.full((1, 32, 1, 1), 1.1)

def memory(): return {k: int(v.split()[0])/1024 for k,v in (l.split(":") for l in Path("/proc/self/status").read_text().splitlines()) if k in ("RssAnon", "RssFile")}

def opening(indices, flips):
    out = []
    for i,f in zip(indices.tolist(), flips.tolist()):
        with safe_open(files[i//PER], framework="pt") as o: row = o.get_slice("latents_flip" if f else "latents")[i % PER:i % PER+1]
        out.append((row-mean)/std)
    return torch.cat(out)

def timed(read, batch):
    order, flips = torch.randperm(n, generator=g)[:batch], torch.rand(batch, generator=g) < .5
    wall, cpu = time.perf_counter(), time.process_time()
    z = read(order, flips)
    return time.process_time()-cpu, time.perf_counter()-wall, z, order, flips

before = memory()
latents = Latents([open_shard(f)[0] for f in files], mean, std)
opened = memory()
for order in torch.randperm(n, generator=g).split(256):
    for f in (False, True): latents.batch(order, f)
after = memory()
rows = []
for batch in a.batches:
    for read in (opening, latents.batch): *_, z, order, flips = timed(read, batch)
    assert torch.equal(z, opening(order, flips))
    runs = [[timed(read, batch)[:2] for read in (opening, latents.batch)] for _ in range(a.rounds)]
    ms = {f"{who}_{kind}_ms": [round(1e3*r[w][k], 1) for r in runs] for w,who in enumerate(("baseline", "ours")) for k,kind in enumerate(("cpu", "wall"))}
    median = {k: statistics.median(v) for k,v in ms.items()}
    rows.append(dict(batch=batch, ratio=median["baseline_cpu_ms"]/median["ours_cpu_ms"], ratio_wall=median["baseline_wall_ms"]/median["ours_wall_ms"],
                     samples_per_second=round(1e3*batch/median["ours_wall_ms"])) | ms)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
mb = {name: {k: round(b[k]-a_[k], 1) for k in b} for name,a_,b in (("opening", before, opened), ("reading_all", opened, after))}
result = dict(command="python bench/latent_loading.py", what=__doc__.splitlines()[0], batches=rows, memory_growth_mb=mb, read_mb=round(n*2*32*16*16*4/1e6), shards=a.shards, images=n,
              latent="32×16×16 float32", threads=torch.get_num_threads(), device=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__, commit=commit)
Path("results").mkdir(exist_ok=True)
Path("results/bench-latent-loading.json").write_text(json.dumps(result, indent=1))
for r in rows: print(f"batch {r['batch']}: {r['ratio']:.1f}× less CPU time ({r['ratio_wall']:.1f}× wall), {r['samples_per_second']:,} samples a second")
print(f"memory after reading {result['read_mb']} MB: own {mb['reading_all']['RssAnon']:+.0f} MB, mapped files {mb['reading_all']['RssFile']:+.0f} MB")
tmp.cleanup()
