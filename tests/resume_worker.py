"""Trainings that are killed, stopped and moved, for test_resume: `python resume_worker.py FOLDER KILLS [stopped] [moved]`. Everything is imported once, then each training is a fork; writes FOLDER/report.json."""
import csv, json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import timm, torch, torch._dynamo # What every training would import anew, the latter for DistributedDataParallel
from together import together, usual_signals
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.recipes.settings import override, save_config
from vavae_nb.recipes.paper import recipe
from vavae_nb.train import main
from vavae_nb.training import stages

stages.draw_curves = lambda run: None # Three seconds of matplotlib each

CONFIG = override(recipe("smoke"), {"device": "cpu", "precision": "fp32", "data.limit": 60, "tokenizer.ch": 8, "tokenizer.latent_dim": 4, "tokenizer.ch_mult": (1, 2, 2), "vf.adaptive_every": 2,
    "tokenizer_training.steps": 10, "tokenizer_training.batch_size": 8, "tokenizer_training.disc_start": 5, "tokenizer_training.lpips_slices": 1, "tokenizer_training.disc_width": 8,
    "tokenizer_training.phases": [dict(steps=5, disc_start=2)], "evaluation.dashboard_every": 8,
    "dit.hidden_size": 32, "dit.depth": 1, "dit.num_heads": 2, "dit_training.steps": 14, "dit_training.batch_size": 8, "saving.every": 3, "saving.log_every": 4})

def train(out, stages, config=None, **env):
    "In a fork: the status it would end with; what it says goes to a file"
    os.environ.update(env)
    with open(out.with_suffix(".txt"), "a", encoding="utf-8") as said:
        os.dup2(said.fileno(), 1); os.dup2(said.fileno(), 2)
        torch.set_num_threads(1)
        try:
            for stage in stages:
                if "MASTER_PORT" in env: os.environ["MASTER_PORT"] = next_port(env["MASTER_PORT"], stage) # They meet anew for each
                main(recipe=str(config or out.parent/"config.yaml"), out=str(out), stage=stage)
            status = 0
        except SystemExit as e: status = e.code if isinstance(e.code, int) else 1
        except BaseException: traceback.print_exc(); status = 99
        sys.stdout.flush(); sys.stderr.flush()
    os._exit(status)

def next_port(first, stage): return str(int(first)+TRAININGS.index(stage)) # The same in all processes

def fork(*args, before=lambda: None, **kw):
    if (pid := os.fork()) == 0: before(); train(*args, **kw)
    return pid

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def on_processes(n, *args, **kw):
    env = together(n)
    return [fork(*args, **kw, **env, RANK=str(r)) for r in range(n)]

def until(condition, pids, seconds=300):
    end = time.time()+seconds
    while not condition() and time.time() < end and not any(os.waitid(os.P_PID, p, os.WEXITED|os.WNOHANG|os.WNOWAIT) for p in pids): time.sleep(.01)

TRAININGS = ("tokenizer", "latents", "dit")

def dies_in_the_write(nth): # At its nth rename of a checkpoint: the data is written and has no name yet, or its JSON is missing
    def patch():
        count, replace = [0], os.replace
        def counting(a, b):
            if "checkpoints" in str(b):
                count[0] += 1
                if count[0] == nth: os.kill(os.getpid(), signal.SIGKILL)
            return replace(a, b)
        os.replace = counting
    return patch

def saved(out): return {(p.name, p.stat().st_ino) for p in out.glob("checkpoints/*/step-*.json")} # Newer ones replace older ones

def kills(folder, n, longer, seed=0):
    "The same run unbroken, and killed n times"
    start = time.time()
    assert ended(fork(folder/"whole", TRAININGS)) == 0, (folder/"whole.txt").read_text(encoding="utf-8")
    whole, rng, at, differ = time.time()-start, random.Random(seed), [], []
    killed = lambda: sum(status == -signal.SIGKILL for status,_ in at)
    while killed() < n and len(at) < 4*n:
        if killed() % 3 == 2: # In the middle of writing a checkpoint
            status = ended(fork(folder/"killed", TRAININGS, before=dies_in_the_write(rng.randint(1, 4))))
        else:
            seen, more, began = saved(folder/"killed"), rng.randint(0, 2), time.time()
            pid = fork(folder/"killed", TRAININGS)
            until(lambda: len(saved(folder/"killed")-seen) >= more, [pid]) # After so many, and a moment of this machine
            time.sleep(rng.uniform(0, .5)*(time.time()-began)/more if more else rng.uniform(.05, .2)*whole/longer)
            os.kill(pid, signal.SIGKILL); status = ended(pid)
        at.append([status, {s: Checkpoints(folder/"killed"/"checkpoints"/s).steps()[-1:] for s in ("tokenizer", "dit")}])
        if status == 0: # It ended before it was killed: the next one begins anew
            differ += differences(folder/"whole", folder/"killed")
            shutil.rmtree(folder/"killed")
    done = ended(fork(folder/"killed", TRAININGS))
    differ += differences(folder/"whole", folder/"killed")
    return dict(kills=killed(), status=done, at=at, seconds=whole, differ=differ)

def differences(a, b):
    "Files and log rows of two runs that are not the same"
    out = [f for f in ("tokenizer.safetensors", "dit.safetensors") if not (b/f).exists() or (a/f).read_bytes() != (b/f).read_bytes()]
    rows = lambda d: sorted((r[0], int(r[1]), r[3], r[4]) for r in csv.reader(open(d/"log.csv", encoding="utf-8")) if r[0] != "stage" and r[3] not in ("images_per_second", "memory_gb", "mfu"))
    return out+[list(map(str, r)) for r in set(rows(a)) ^ set(rows(b))]

def stopped(folder):
    "SIGTERM once: saved and ended; then continued"
    pid = fork(folder/"stopped", TRAININGS, before=usual_signals)
    until(lambda: (folder/"stopped"/"log.csv").exists(), [pid])
    os.kill(pid, signal.SIGTERM)
    status, said = ended(pid), (folder/"stopped.txt").read_text(encoding="utf-8")
    steps = Checkpoints(folder/"stopped"/"checkpoints"/"tokenizer").steps()
    return dict(status=status, said=said, steps=steps, then=ended(fork(folder/"stopped", TRAININGS)), differ=differences(folder/"whole", folder/"stopped"))

def moved(folder):
    "Begun on two processes, one of which is killed; then continued on one and on three"
    pids = on_processes(2, folder/"two", ("tokenizer",))
    until(lambda: len(Checkpoints(folder/"two"/"checkpoints"/"tokenizer").steps()) > 1, pids)
    os.kill(pids[1], signal.SIGKILL)
    status, said = [ended(p) for p in pids], (folder/"two.txt").read_text(encoding="utf-8")
    step, out = Checkpoints(folder/"two"/"checkpoints"/"tokenizer").newest()[0], dict(status=status, said=said)
    for n in (1, 3):
        os.system(f"cp -r {folder/'two'} {folder/f'on{n}'}")
        out[f"on{n}"] = [ended(p) for p in (on_processes(n, folder/f"on{n}", TRAININGS) if n > 1 else [fork(folder/f"on{n}", TRAININGS)])]
        out[f"apart{n}"] = apart(folder/"whole", folder/f"on{n}")
    return out | dict(step=step)

def apart(a, b):
    "Largest relative difference of a loss, in training or validation, between the logs of two runs, step by step"
    rows = lambda d: {(r[0], r[1], r[3]): float(r[4]) for r in csv.reader(open(d/"log.csv", encoding="utf-8")) if r[3] == "loss" or r[3].startswith("valid/")}
    x, y = rows(a), rows(b)
    assert x.keys() == y.keys(), x.keys() ^ y.keys()
    return max(abs(y[k]/x[k]-1) for k in x)

if __name__ == "__main__":
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    longer = max(1, n//4) # Each kill costs the steps since a checkpoint, yet the run gets on: it must not end before it was killed n times
    t = CONFIG.tokenizer_training
    save_config(override(CONFIG, {"tokenizer_training.steps": t.steps*longer, "tokenizer_training.phases": [dict(steps=t.phases[0].steps*longer, disc_start=2)], "dit_training.steps": CONFIG.dit_training.steps*longer}), folder/"config.yaml")
    report = dict(kills=kills(folder, n, longer))
    for f in (stopped, moved):
        if f.__name__ in sys.argv: report[f.__name__] = f(folder)
    (folder/"report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
