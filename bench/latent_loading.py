"""Shuffled batches of latents from memory-mapped shards, against opening the shard for every sample.

    python bench/latent_loading.py [--rounds 15] [--threads 1]

Baseline: a data set that opens its safetensors file for each sample and reads one row (as the published system's data
set does), normalises it, and stacks a batch of them. Ours: `Latents.batch`. The same shards in the published shape
(32×16×16, float32, both flips; random numbers), the same shuffled indices and flips, results compared in the same run;
the two take turns after a warm-up, so that both read from the page cache, and the ratio is of medians of CPU time,
which other work on the machine disturbs less than wall time; both times are in the result, and that of copying the same
rows into one tensor (`torch.stack` of views that are there), below which no loader can go. Memory is the process's own
(RssAnon) and that of mapped files (RssFile), before and after reading all. Writes results/bench-latent-loading.json.
"""
import statistics, tempfile
from pathlib import Path
import torch
from common import compare, memory, options, save, show, start, take_turns
from safetensors import safe_open
from vavae_nb.tokenizer.latents import Latents
from vavae_nb.tokenizer.shards import open_shard, shard_files
from vavae_nb.base.tensors import generator
from vavae_nb.base.tensor_files import save_tensors

p = options(__doc__, rounds=15, threads=1, device="cpu")
p.add_argument("--batches", type=int, nargs="+", default=[64, 256, 900, 1024],
               help="samples in a batch (default: 64 256 900 1024; 1024 of them are 34 MB)")
p.add_argument("--shards", type=int, default=8, help="shards of 1,000 images (default: 8, which is 0.5 GB)")
a = start(p)
PER, g = 1000, generator(0, "bench")
tmp = tempfile.TemporaryDirectory()
for s in range(a.shards):
    z = torch.randn(2, PER, 32, 16, 16, generator=g)
    tensors = dict(latents=z[0], latents_flip=z[1], labels=torch.arange(PER) % 10)
    save_tensors(Path(tmp.name)/f"latents_rank00_shard{s:03d}.safetensors", tensors)
del z, tensors
files, n = shard_files(tmp.name), PER*a.shards
mean, std = torch.full((1, 32, 1, 1), .1), torch.full((1, 32, 1, 1), 1.1)

def places(indices, flips):
    "Shard, tensor and row of each"
    for i,flip in zip(indices.tolist(), flips.tolist()): yield i//PER, "latents_flip" if flip else "latents", i % PER

def shuffled(batch):
    "Indices, flips, and views of the rows that they name"
    indices, flips = torch.randperm(n, generator=g)[:batch], torch.rand(batch, generator=g) < .5
    return indices, flips, [latents.shards[shard][name][row] for shard,name,row in places(indices, flips)]

def opening(indices, flips, views):
    out = []
    for shard,name,row in places(indices, flips):
        with safe_open(files[shard], framework="pt") as f: z = f.get_slice(name)[row:row+1]
        out.append((z-mean)/std)
    return torch.cat(out)

def ours(indices, flips, views): return latents.batch(indices, flips)
def copying(indices, flips, views): return torch.stack(views)
sides = dict(opening=opening, ours=ours, copying=copying)

before = memory()
latents = Latents([open_shard(f)[0] for f in files], mean, std)
opened = memory()
for order in torch.randperm(n, generator=g).split(256):
    for f in (False, True): latents.batch(order, f)
after = memory()
rows = {}
for batch in a.batches:
    given = shuffled(batch)
    assert torch.equal(sides["ours"](*given), sides["opening"](*given))
    times = take_turns(sides, a.rounds, args=lambda: shuffled(batch))
    row = compare(times, "opening", clock="cpu")
    copied, loaded = (statistics.median(times[side]["cpu"]) for side in ("copying", "ours"))
    per_second = round(1e3*batch/statistics.median(row["ours_wall_ms"]))
    rows[f"batch {batch}"] = row | dict(batch=batch, samples_per_second=per_second, copying_share=copied/loaded)
show(rows, goal=20)
for k,r in rows.items(): print(f"{k}: copying alone takes {r['copying_share']:.0%} of ours")
def growth(first, last): return {k: round(last[k]-first[k], 1) for k in first}
grown = dict(opening=growth(before, opened), reading_all=growth(opened, after))
own, mapped = grown["reading_all"]["RssAnon"], grown["reading_all"]["RssFile"]
read = round(n*2*32*16*16*4/1e6)
print(f"memory after reading {read} MB: own {own:+.0f} MB, mapped files {mapped:+.0f} MB")
save(a, __doc__, dict(batches=list(rows.values()), goal=20, memory_growth_mb=grown, read_mb=read, shards=a.shards,
                      images=n, latent="32×16×16 float32"))
tmp.cleanup()
