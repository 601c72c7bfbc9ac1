"""What the paper's foundation models cost at full architecture: parameters, FLOPs, seconds, memory; a 16 × 16 grid.

    python bench/foundation_models.py [--rounds 3] [--batch 2] [--threads 1]

Random weights, 256 × 256 images, forward passes only. Each model has a process of its own, so that a peak of memory is
one model's; it includes drawing the weights. Seconds in fp32 are of several rounds after a warm-up, by the processor's
clock (summed over threads; other work on the machine does not count) and by the wall's; as a bf16 module the network
runs once, on one image. Writes results/bench-foundation-models.json.
"""
import argparse, json, resource, statistics, subprocess, sys, time
from pathlib import Path
import torch
from vavae_nb.base.tensors import generator, has_bf16
from vavae_nb.tokenizer.foundation import FoundationModel, foundation_cost, paper_vfms

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
p.add_argument("--batch", type=int, default=2, help="images (default: 2)")
p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
p.add_argument("--only", help="measure this model and print it, as the processes of this command do")
a = p.parse_args()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)

def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    return f(), time.process_time()-cpu, time.perf_counter()-wall

def measure(name):
    torch.set_num_threads(a.threads)
    cost, before = foundation_cost(name), peak() # By then everything is imported
    vfm, build, _ = timed(lambda: FoundationModel(name, 16, weights="random"))
    x = torch.rand(a.batch, 3, 256, 256, generator=generator(0, "x"))*2-1
    exact = vfm(x) # Warm-up, and the memory of fp32
    out = cost | dict(model=paper_vfms.get(name, name), features=list(exact.shape[1:]), build_s=build,
                      imports_bytes=before, peak_bytes=peak())
    rounds = [timed(lambda: vfm(x))[1:] for _ in range(a.rounds)]
    cpu, wall = ([t/a.batch for t in ts] for ts in zip(*rounds))
    vfm = vfm.to(torch.bfloat16)
    y, bf16, _ = timed(lambda: vfm(x[:1]))
    change = (y.float()-exact[:1]).norm()/exact[:1].norm()
    return out | dict(processor_s=cpu, wall_s=wall, bf16_processor_s=bf16, bf16_change=change.item())

if a.only:
    print(json.dumps(measure(a.only)))
    sys.exit()
models, given = {}, ["--rounds", str(a.rounds), "--batch", str(a.batch), "--threads", str(a.threads)]
for name in (*paper_vfms, "efficientnet_lite0"):
    r = subprocess.run([sys.executable, __file__, "--only", name, *given], capture_output=True, encoding="utf-8")
    if r.returncode: sys.exit(r.stderr)
    models[name] = m = json.loads(r.stdout.splitlines()[-1])
    print(f"{name:20} {m['parameters']/1e6:6.1f} M {m['flops']/1e9:6.1f} GFLOPs, processor seconds an image: "
          f"fp32 {statistics.median(m['processor_s']):.2f}, bf16 {m['bf16_processor_s']:.2f}; "
          f"peak {m['peak_bytes']/1e9:.2f} GB", flush=True)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, encoding="utf-8").stdout.strip()
result = dict(command=" ".join(["python bench/foundation_models.py", *given]), what=__doc__.splitlines()[0],
              models=models, grid=16, image=256, batch=a.batch, threads=a.threads,
              device=torch.backends.cpu.get_cpu_capability(), bf16_instructions=has_bf16(torch.device("cpu")),
              torch=torch.__version__, commit=commit)
Path("results").mkdir(exist_ok=True)
Path("results/bench-foundation-models.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
