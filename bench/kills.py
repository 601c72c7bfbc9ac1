"""A small run, killed at any moment and at the boundaries of its stages: is anything lost, does it end as the unbroken?

    python bench/kills.py [--kills 100] [--seed 0] [--out FILE] [--folder FOLDER]

A complete run (tokenizer in two phases with GAN and VF loss, latents, LightningDiT, samples, evaluation) through
`vavae_nb.train.main`, in a fork of this process, which has imported everything once. First unbroken: the reference.
Then the same command as often as it takes, each time until it is killed or ends; a run that has ended is compared with
the reference, and the next one begins in another folder. Half of the kills are SIGKILLs at random moments. The others
are aimed, in two ways:

* seen: this process looks at the run folder every few milliseconds, and kills when, for instance, a model is written,
  but not recorded
* call: the run kills itself before or after its n-th os.replace, os.rename, os.unlink, shutil.rmtree,
  Checkpoints.finish or Run.record of a kind that the reference had, two of three times by SIGKILL, else by SIGTERM

A stage is trained twice if an optimizer takes a step in it after its model file was whole: all of its time is lost,
or a part of it. Steps are counted by a hook of torch's that knows nothing of the package. Writes results/kills.json;
ends with status 1 if a run is not the reference's, or a stage was trained twice.
"""
import argparse, csv, json, os, random, re, shutil, signal, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path
os.environ.setdefault("OMP_NUM_THREADS", "1") # Before torch: a fork has no other threads than the one that forked
import timm, torch, torch._dynamo # What every run would import anew
import matplotlib.pyplot as plt
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_post_hook
from common import ROOT, save, start
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.recipes.settings import override, save_config
from vavae_nb.base.errors import VavaeError
from vavae_nb.base.files import cache_dir
from vavae_nb.base.progress import spoken
from vavae_nb.metrics.features import feature_extractor
from vavae_nb.recipes.paper import recipe
from vavae_nb.train import main
from vavae_nb.training.run import Run

STAGES = ("tokenizer", "latents", "dit", "sample", "evaluate")
CLOCKS = ("images_per_second", "memory_gb", "mfu")
SMALL = {
    "device": "cpu", "precision": "fp32", "data.limit": 60,
    "tokenizer.ch": 8, "tokenizer.latent_dim": 4, "vf.adaptive_every": 2,
    "tokenizer_training.steps": 14, "tokenizer_training.batch_size": 8, "tokenizer_training.disc_start": 5,
    "tokenizer_training.disc_width": 8, "tokenizer_training.lpips_slices": 1,
    "tokenizer_training.phases": [dict(steps=10, disc_start=2)],
    "dit.hidden_size": 32, "dit.depth": 1, "dit.num_heads": 2, "dit_training.steps": 24, "dit_training.batch_size": 8,
    "sampling.n": 40, "evaluation.images": 40, "evaluation.reference": 60, "evaluation.tsne_points": 60,
    "evaluation.batch_size": 20, "saving.every": 3, "saving.log_every": 4}

# ---- The run folder, from outside

def done(out):
    "The stages that are recorded"
    try: return set(json.loads((out/"state.json").read_text(encoding="utf-8")))
    except FileNotFoundError: return set()

def current(out):
    "The stage that is being done"
    return next((s for s in STAGES if s not in done(out)), "end")

def whole(path):
    "Is it a complete file of tensors?"
    try:
        with safe_open(path, "pt") as f: return bool(f.keys())
    except Exception: return False

def written(stage): return lambda out: (out/f"{stage}.safetensors").exists() and stage not in done(out)
def unguarded(stage): return lambda out: written(stage)(out) and not (out/"checkpoints"/stage).exists()
def kept(stage): return lambda out: stage in done(out) and (out/"checkpoints"/stage).exists()
def drawn(out): return (out/"samples.npz").exists() and (out/"drawn").exists()
def tidied(out): return (out/"samples.npz").exists() and not (out/"drawn").exists() and "sample" not in done(out)
def encoded(out): return any(out.glob("latents/latents_*.safetensors")) and "latents" not in done(out)
def measured(out): return (out/"metrics.json").exists() and "evaluate" not in done(out)
def drawing(stage): return lambda out: written(stage)(out) and any(out.glob(".curves.png*"))

SEEN = { # What is waited for → the stage that it belongs to, and how it is seen
    "tokenizer written, not recorded": ("tokenizer", written("tokenizer")),
    "tokenizer written, no checkpoint, not recorded": ("tokenizer", unguarded("tokenizer")),
    "curves of the tokenizer half written": ("tokenizer", drawing("tokenizer")),
    "tokenizer recorded, checkpoints there": ("latents", kept("tokenizer")),
    "latents written, not recorded": ("latents", encoded),
    "dit written, not recorded": ("dit", written("dit")),
    "dit written, no checkpoint, not recorded": ("dit", unguarded("dit")),
    "curves of dit half written": ("dit", drawing("dit")),
    "dit recorded, checkpoints there": ("sample", kept("dit")),
    "samples written, chunks there": ("sample", drawn),
    "chunks gone, samples not recorded": ("sample", tidied),
    "metrics written, not recorded": ("evaluate", measured)}

def snapshot(out): # What changes as a run gets on
    files = (p for p in out.rglob("*") if p.suffix in (".json", ".safetensors", ".npz") and not p.name.startswith("."))
    return {(str(p), p.stat().st_ino) for p in files if p.exists()}

def leftovers(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))

def contents(out):
    "What of a run is decided by its settings, in a form to compare"
    names = ("tokenizer.safetensors", "dit.safetensors", "samples.npz", "samples_unguided.npz", "tsne.npy")
    files = [*(out/n for n in names), *sorted(out.glob("latents/*.safetensors"))]
    found = {str(p.relative_to(out)): p.read_bytes() if p.exists() else None for p in files}
    with open(out/"log.csv", newline="", encoding="utf-8") as f: rows = list(csv.reader(f))
    found["log.csv"] = sorted((r[0], r[1], r[3], r[4]) for r in rows if r[3] not in CLOCKS)
    found["metrics.json"] = timeless(json.loads((out/"metrics.json").read_text(encoding="utf-8")))
    return found

def timeless(node): # Commit: somebody may be working on the code
    if isinstance(node, list): return [timeless(v) for v in node]
    if not isinstance(node, dict): return node
    return {k: timeless(v) for k,v in node.items() if k not in ("seconds", "commit")}

def differences(reference, out):
    "Names of what is not the reference's"
    mine = contents(out)
    return sorted(k for k in reference.keys() | mine.keys() if reference.get(k) != mine.get(k))

# ---- A run, in a fork

CALLS = { # Whose, and which argument is the path
    "os.replace": (os, 1), "os.rename": (os, 1), "os.unlink": (os, 0), "shutil.rmtree": (shutil, 0),
    "Checkpoints.finish": (Checkpoints, 0), "Run.record": (Run, 1)}

def kind_of(name, args, out):
    "A call as `function path`, numbers and random letters left out; nothing for what is not of the run"
    what = args[CALLS[name][1]]
    if isinstance(what, Checkpoints): what = what.folder.name
    path = os.fspath(what)
    if os.path.isabs(path):
        if not path.startswith(f"{out}{os.sep}"): return ""
        path = os.path.relpath(path, out)
    path = re.sub(r"\.\w{8}\.", ".*.", path) # As mkstemp does
    path = re.sub(r"-[0-9a-f]{8}\.", "-*.", path) # A checkpoint's checksum
    return f"{name} {re.sub(r'[0-9]+', 'N', path)}"

def listen(out, aim):
    "Note the calls of a run, and end it at one of them: `aim` has its kind and number, before or after, and the signal"
    notes = os.open(out.with_suffix(".calls"), os.O_CREAT|os.O_APPEND|os.O_WRONLY)
    seen = Counter()
    def die():
        os.write(notes, b"KILL\n")
        os.kill(os.getpid(), aim["signal"])
    def wrap(name, call):
        def wrapped(*args, **kw):
            if not (kind := kind_of(name, args, out)): return call(*args, **kw)
            kind = f"{current(out)}: {kind}"
            os.write(notes, f"{kind}\n".encode())
            seen[kind] += 1
            hit = aim and kind == aim["kind"] and seen[kind] == aim["nth"]
            if hit and aim["when"] == "before": die()
            result = call(*args, **kw)
            if hit and aim["when"] == "after": die()
            return result
        return wrapped
    for name,(owner,_) in CALLS.items():
        attribute = name.split(".")[1]
        setattr(owner, attribute, wrap(name, getattr(owner, attribute)))

def count_steps(out):
    "A byte for each step of an optimizer: t while the latents are not there yet, then d"
    notes = os.open(out.with_suffix(".steps"), os.O_CREAT|os.O_APPEND|os.O_WRONLY)
    register_optimizer_step_post_hook(lambda *_: os.write(notes, b"d" if "latents" in done(out) else b"t"))

def fork(out, config, aim=None):
    "Begin or go on with a run; its process"
    if pid := os.fork(): return pid
    status = 99
    try:
        said = os.open(out.with_suffix(".txt"), os.O_CREAT|os.O_APPEND|os.O_WRONLY)
        for fd in (1, 2): os.dup2(said, fd)
        listen(out, aim)
        count_steps(out)
        main(recipe=str(config), out=str(out))
        status = 0
    except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def ended(pid, seconds=0.):
    "Its status once it has ended, or `None` after so many seconds"
    end = time.time()+seconds
    while True:
        if (found := os.waitpid(pid, os.WNOHANG))[0]: return os.waitstatus_to_exitcode(found[1])
        if time.time() >= end: return None
        time.sleep(.002)

# ---- Kills

class Killer:
    "Runs that are killed, and what was seen of it"
    def __init__(self,
        folder, # Of all runs
        config, # A config.yaml
        seed,   # Of moments and aims
    ):
        self.folder, self.config, self.rng = folder, config, random.Random(seed)
        self.kills, self.twice, self.ends, self.failures, self.n = [], [], [], [], 0
        self._next()

    def _next(self):
        self.n += 1
        self.out, self.stuck, self.bad = self.folder/f"run{self.n}", 0, 0
        self.cause, self.paid = {}, set() # Stage with a whole model, not recorded → the kill; stages that were counted

    def reference(self):
        "The unbroken run"
        out, began = self.folder/"whole", time.time()
        if (status := ended(fork(out, self.config), 1200)) != 0: sys.exit(f"status {status}: {said(out)}")
        self.seconds, self.calls, self.contents = time.time()-began, calls(out), contents(out)
        self.steps = steps(out)
        return dict(seconds=round(self.seconds, 1), calls=sum(self.calls.values()), kinds=len(self.calls),
                    optimizer_steps=dict(self.steps), leftovers=leftovers(out))

    def choose(self):
        "How the next process is to be killed"
        way = ("random", "seen", "random", "call")[len(self.kills) % 4]
        left = {k: n for k,n in (self.calls-calls(self.out)).items() if k.split(":")[0] not in done(self.out)}
        ahead = [k for k,(stage,f) in SEEN.items() if stage not in done(self.out) and not f(self.out)]
        draw = self.rng
        if way == "seen" and ahead:
            return dict(way=way, kind=draw.choice(ahead), wait=draw.choice((0., draw.uniform(0, .3))))
        if way != "random" and left:
            kind, sig = draw.choice(sorted(left)), draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            when, nth = draw.choice(("before", "after")), draw.randint(1, left[kind])
            return dict(way="call", kind=kind, nth=nth, when=when, signal=sig)
        return dict(way="random", kind="a random moment", wait=draw.uniform(0, self.seconds/4))

    def kill(self, pid, aim):
        "Its status, killed or ended by itself"
        if aim["way"] in ("call", "none"): return ended(pid, 1200)
        before = snapshot(self.out)
        condition = SEEN[aim["kind"]][1] if aim["way"] == "seen" else lambda out: self.stuck < 2 or snapshot(out)-before
        while not condition(self.out):
            if (status := ended(pid)) is not None: return status
            time.sleep(.003)
        if (status := ended(pid, aim["wait"])) is not None: return status
        os.kill(pid, signal.SIGKILL)
        return ended(pid, 60)

    def once(self, aim):
        "Go on with the run until it is killed or ends; True if it was killed"
        out = self.out
        trained = self.trained()
        files, before, shots = snapshot(out), steps(out), calls(out)["KILL"]
        status = self.kill(fork(out, self.config, aim if aim["way"] == "call" else None), aim)
        self._count(trained, steps(out)-before)
        killed = status == -signal.SIGKILL or calls(out)["KILL"] > shots
        self.stuck = 0 if snapshot(out)-files else self.stuck+1
        if killed:
            stage = current(out)
            sig = signal.Signals(aim.get("signal", signal.SIGKILL)).name
            self.kills.append(dict(way=aim["way"], kind=aim["kind"], signal=sig, stage=stage, status=status, run=self.n)
                              | {k: aim[k] for k in ("when", "nth") if k in aim})
            self.cause = {s: self.cause.get(s, described(self.kills[-1])) for s in self.trained()}
        if status == 0: self.end()
        elif status not in (-signal.SIGKILL, 128+signal.SIGTERM): self._failed(status, aim)
        return killed

    def trained(self):
        "Stages that are not recorded, but whose model is whole"
        return {s for s in ("tokenizer", "dit") if whole(self.out/f"{s}.safetensors")}-done(self.out)

    def _count(self, trained, more): # Stages whose model was whole before, and steps since
        for stage,letter in (("tokenizer", "t"), ("dit", "d")):
            if stage not in trained or not more[letter]: continue
            if stage not in self.paid:
                self.twice.append(dict(stage=stage, run=self.n, optimizer_steps=0, of=self.steps[letter],
                                       after=self.cause.get(stage)))
            self.paid.add(stage)
            self.twice[-1]["optimizer_steps"] += more[letter]
        self.paid -= done(self.out)

    def _failed(self, status, aim):
        self.bad += 1
        self.failures.append(dict(run=self.n, status=status, aim=str(aim), said=said(self.out)))
        if self.bad == 3: self._next() # It does not get on

    def end(self):
        "Compare a run that has ended, and begin the next"
        out = self.out
        more = sorted(str(p.relative_to(out)) for p in (out/"drawn", *out.glob("checkpoints/*/*")) if p.exists())
        kills = sum(k["run"] == self.n for k in self.kills)
        self.ends.append(dict(run=self.n, kills=kills, differ=differences(self.contents, out), leftovers=leftovers(out),
                              more=more, lock=(out/"run.lock").exists()))
        if not self.ends[-1]["differ"]: shutil.rmtree(out)
        self._next()

def described(kill):
    "A kill in words"
    return f"{kill['signal']} {kill.get('when', 'at')} {kill['kind']}, in {kill['stage']}, status {kill['status']}"

def said(out, n=800): return out.with_suffix(".txt").read_text(errors="replace")[-n:]

def calls(out):
    "The kinds of calls that a run has made in all its processes, and how often"
    path = out.with_suffix(".calls")
    return Counter(path.read_text(encoding="utf-8").splitlines()) if path.exists() else Counter()

def steps(out):
    "Steps of the tokenizer's optimizers and of LightningDiT's"
    path = out.with_suffix(".steps")
    return Counter(path.read_text(encoding="utf-8")) if path.exists() else Counter()

def prepare(folder):
    "The configuration of all runs; features in a cache of their own, since kills leave files there, too"
    weights = cache_dir("weights")
    os.environ["VAVAE_NB_CACHE"] = str(folder/"cache")
    (folder/"cache").mkdir(parents=True)
    (folder/"cache"/"weights").symlink_to(weights.resolve())
    try: extractors = (feature_extractor("alexnet").name,)
    except VavaeError: extractors = ("efficientnet_lite0",)
    plt.close(plt.figure()) # Its fonts are found once
    save_config(override(recipe("smoke"), SMALL | {"evaluation.extractors": extractors}), folder/"config.yaml")
    return folder/"config.yaml", extractors

def report(k, a):
    "What goes into the result"
    count = lambda key: dict(Counter(str(o[key]) for o in k.kills).most_common())
    failed = [e for e in k.ends if e["differ"]]
    by = dict(by_way=count("way"), by_kind=count("kind"), by_stage=count("stage"), by_signal=count("signal"))
    by["statuses"] = count("status")
    ends = dict(runs_ended=len(k.ends), runs_that_differ=len(failed), differences=failed, failures=k.failures)
    twice = dict(trained_twice=len(k.twice), trained_twice_by_stage=dict(Counter(t["stage"] for t in k.twice)),
                 trained_twice_after=k.twice, swallowed=sum(o["status"] == 0 for o in k.kills))
    left = dict(leftovers=sorted({f"run{e['run']}/{f}" for e in k.ends for f in e["leftovers"]}),
                leftovers_in_cache=leftovers(k.folder/"cache"), locks_left=sum(e["lock"] for e in k.ends),
                checkpoints_or_chunks_left=sorted({f"run{e['run']}/{f}" for e in k.ends for f in e["more"]}))
    by["every_kill"] = list(map(described, k.kills))
    return dict(seed=a.seed, kills=len(k.kills)) | by | ends | twice | left

def run(a):
    "The reference, the kills, and the result"
    folder = Path(a.folder or tempfile.mkdtemp(prefix="kills-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, extractors = prepare(folder)
    k = Killer(folder, config, a.seed)
    reference = k.reference()
    print(f"unbroken: {reference['seconds']} s, {reference['calls']} calls of {reference['kinds']} kinds", flush=True)
    began = time.time()
    while len(k.kills) < a.kills:
        if not k.once(k.choose()): continue
        n = len(k.kills)
        left = (time.time()-began)/n*(a.kills-n)
        print(f"{n} of {a.kills}: {described(k.kills[-1])}; "
              f"{len(k.twice)} trained twice, {len(k.ends)} runs ended; about {spoken(left)} left", flush=True)
    while any(o["run"] == k.n for o in k.kills): k.once(dict(way="none", kind="none")) # The last one goes on to its end
    how = dict(reference=reference, extractors=extractors, settings=SMALL, seconds=round(time.time()-began, 1))
    result = how | report(k, a)
    save(a, __doc__, result)
    keys = ("kills", "by_way", "by_stage", "statuses", "runs_ended", "runs_that_differ", "trained_twice",
            "trained_twice_by_stage", "swallowed", "locks_left")
    for key in keys: print(f"{key:27} {result[key]}")
    for key in ("failures", "leftovers", "leftovers_in_cache", "checkpoints_or_chunks_left"):
        print(f"{key:27} {len(result[key])}")
    if not a.folder: shutil.rmtree(folder)
    sys.exit(int(bool(result["trained_twice"] or result["runs_that_differ"] or result["failures"])))

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    p.add_argument("--seed", type=int, default=0, help="of moments and aims (default: 0)")
    p.add_argument("--out", default=ROOT/"results/kills.json", help="file of the result (default: results/kills.json)")
    p.add_argument("--folder", help="of the runs, new and kept afterwards (default: a temporary one)")
    p.set_defaults(threads=1, device="cpu")
    run(start(p))
