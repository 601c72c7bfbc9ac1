"""Trainings that are killed, stopped and moved, for test_resume:
`python resume_worker.py FOLDER KILLS [stopped] [moved]`. Everything is imported once, then each training is a fork;
writes FOLDER/report.json."""
import csv, json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import timm, torch, torch._dynamo # What every training would import anew, the latter for DistributedDataParallel
from together import together, usual_signals
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.recipes.paper import recipe
from vavae_nb.recipes.settings import override, save_config
from vavae_nb.train import main
from vavae_nb.training import stages

stages.draw_curves = lambda run: None # Three seconds of matplotlib each

CONFIG = override(recipe("smoke"), {
    "device": "cpu", "precision": "fp32", "data.limit": 60, "vf.adaptive_every": 2, "evaluation.dashboard_every": 8,
    "tokenizer.ch": 8, "tokenizer.latent_dim": 4, "tokenizer.ch_mult": (1, 2, 2),
    "tokenizer_training.steps": 10, "tokenizer_training.batch_size": 8, "tokenizer_training.disc_start": 5,
    "tokenizer_training.lpips_slices": 1, "tokenizer_training.disc_width": 8,
    "tokenizer_training.phases": [dict(steps=5, disc_start=2)],
    "dit.hidden_size": 32, "dit.depth": 1, "dit.num_heads": 2, "dit_training.steps": 14, "dit_training.batch_size": 8,
    "saving.every": 3, "saving.log_every": 4})
TRAININGS = ("tokenizer", "latents", "dit")

def train(out, stages, config=None, **env):
    "In a fork: the status it would end with; what it says goes to a file"
    os.environ.update(env)
    with open(out.with_suffix(".txt"), "a", encoding="utf-8") as said:
        for fd in (1, 2): os.dup2(said.fileno(), fd)
        torch.set_num_threads(1)
        status = 0
        try:
            for stage in stages:
                # Processes meet anew for each
                if "MASTER_PORT" in env: os.environ["MASTER_PORT"] = next_port(env["MASTER_PORT"], stage)
                main(recipe=str(config or out.parent/"config.yaml"), out=str(out), stage=stage)
        except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)

def next_port(first, stage): return str(int(first)+TRAININGS.index(stage)) # The same in all processes

def fork(*args, before=lambda: None, **kw):
    pid = os.fork()
    if pid == 0:
        before()
        train(*args, **kw)
    return pid

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def on_processes(n, *args, **kw):
    env = together(n)
    return [fork(*args, **kw, **env, RANK=str(r)) for r in range(n)]

def until(condition, pids, seconds=300):
    def ended(pid): return os.waitid(os.P_PID, pid, os.WEXITED|os.WNOHANG|os.WNOWAIT)
    end = time.time()+seconds
    while not condition() and time.time() < end and not any(map(ended, pids)): time.sleep(.01)

def dies_in_the_write(nth):
    "At its nth rename of a checkpoint: the data is written and has no name yet, or its JSON is missing"
    def patch():
        count, replace = [0], os.replace
        def counting(a, b):
            if "checkpoints" in str(b):
                count[0] += 1
                if count[0] == nth: os.kill(os.getpid(), signal.SIGKILL)
            return replace(a, b)
        os.replace = counting
    return patch

def saved(out): # Newer ones replace older ones
    return {(p.name, p.stat().st_ino) for p in out.glob("checkpoints/*/step-*.json")}

def steps(out, stage): return Checkpoints(out/"checkpoints"/stage).steps()

def kills(folder, n, longer, seed=0):
    "The same run unbroken, and killed n times"
    whole, run, start = folder/"whole", folder/"killed", time.time()
    assert ended(fork(whole, TRAININGS)) == 0, (folder/"whole.txt").read_text(encoding="utf-8")
    seconds, rng = time.time()-start, random.Random(seed)
    at, differ = [], []
    def killed(): return sum(status == -signal.SIGKILL for status,_ in at)
    while killed() < n and len(at) < 4*n:
        if killed() % 3 == 2: # In the middle of writing a checkpoint
            status = ended(fork(run, TRAININGS, before=dies_in_the_write(rng.randint(1, 4))))
        else:
            seen, more, start = saved(run), rng.randint(0, 2), time.time()
            pid = fork(run, TRAININGS)
            until(lambda: len(saved(run)-seen) >= more, [pid]) # After so many, and a moment of this machine
            pause = rng.uniform(0, .5)*(time.time()-start)/more if more else rng.uniform(.05, .2)*seconds/longer
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
            status = ended(pid)
        at.append([status, {stage: steps(run, stage)[-1:] for stage in ("tokenizer", "dit")}])
        if status == 0: # It ended before it was killed: the next one begins anew
            differ += differences(whole, run)
            shutil.rmtree(run)
    done = ended(fork(run, TRAININGS))
    differ += differences(whole, run)
    return dict(kills=killed(), status=done, at=at, seconds=seconds, differ=differ)

def log_rows(out):
    with open(out/"log.csv", encoding="utf-8", newline="") as f: return list(csv.reader(f))[1:]

def differences(a, b):
    "Files and log rows of two runs that are not the same"
    def same(name): return (b/name).exists() and (a/name).read_bytes() == (b/name).read_bytes()
    def rows(out):
        timeless = [r for r in log_rows(out) if r[3] not in ("images_per_second", "memory_gb", "mfu")]
        return {(stage, int(step), term, value) for stage,step,_,term,value in timeless}
    files = [name for name in ("tokenizer.safetensors", "dit.safetensors") if not same(name)]
    return files+[list(map(str, row)) for row in rows(a) ^ rows(b)]

def stopped(folder):
    "SIGTERM once: saved and ended; then continued"
    out = folder/"stopped"
    pid = fork(out, TRAININGS, before=usual_signals)
    until((out/"log.csv").exists, [pid])
    os.kill(pid, signal.SIGTERM)
    status, said = ended(pid), (folder/"stopped.txt").read_text(encoding="utf-8")
    result = dict(status=status, said=said, steps=steps(out, "tokenizer"), then=ended(fork(out, TRAININGS)))
    return result | dict(differ=differences(folder/"whole", out))

def moved(folder):
    "Begun on two processes, one of which is killed; then continued on one and on three"
    two = folder/"two"
    pids = on_processes(2, two, ("tokenizer",))
    until(lambda: len(steps(two, "tokenizer")) > 1, pids)
    os.kill(pids[1], signal.SIGKILL)
    status, said = [ended(p) for p in pids], (folder/"two.txt").read_text(encoding="utf-8")
    step, result = Checkpoints(two/"checkpoints"/"tokenizer").newest()[0], dict(status=status, said=said)
    for n in (1, 3):
        out = folder/f"on{n}"
        os.system(f"cp -r {two} {out}")
        pids = on_processes(n, out, TRAININGS) if n > 1 else [fork(out, TRAININGS)]
        result[f"on{n}"] = [ended(p) for p in pids]
        result[f"apart{n}"] = apart(folder/"whole", out)
    return result | dict(step=step)

def apart(a, b):
    "Largest relative difference of a loss, in training or validation, between the logs of two runs, step by step"
    def losses(out):
        rows = [r for r in log_rows(out) if r[3] == "loss" or r[3].startswith("valid/")]
        return {(stage, step, term): float(value) for stage,step,_,term,value in rows}
    x, y = losses(a), losses(b)
    assert x.keys() == y.keys(), x.keys() ^ y.keys()
    return max(abs(y[k]/x[k]-1) for k in x)

def lengthened(cfg, times):
    t = cfg.tokenizer_training
    return override(cfg, {"tokenizer_training.steps": t.steps*times, "dit_training.steps": cfg.dit_training.steps*times,
                          "tokenizer_training.phases": [dict(steps=t.phases[0].steps*times, disc_start=2)]})

if __name__ == "__main__":
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    # Each kill costs the steps since a checkpoint, yet the run gets on: it must not end before it was killed n times
    longer = max(1, n//4)
    save_config(lengthened(CONFIG, longer), folder/"config.yaml")
    report = dict(kills=kills(folder, n, longer))
    for f in (stopped, moved):
        if f.__name__ in sys.argv: report[f.__name__] = f(folder)
    (folder/"report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
