"Logs: rows on many processes, after a kill, in TensorBoard and W&B, and lines without a terminal"
import copy, os, re, subprocess, sys, traceback, types
from functools import partial
from pathlib import Path
import pytest, torch
from together import together
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from vavae_nb.data.batches import Batches
from vavae_nb.base.processes import is_first, joined
from vavae_nb.training.callbacks import ClipGrad, DataParallel, Loaders, LRSchedule, MaxSteps, StepLearner, fit_steps
from vavae_nb.training.logs import StepBar, TensorBoardWriter, TermsLog, WandbWriter, cut_log, read_log
from vavae_nb.training.resuming import Resume, training_state

CLOCKS = ("images_per_second", "memory_gb", "mfu")

class Loss(nn.Module):
    "Of two terms, one of them in two steps of three"
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(0))
    def forward(self, pred, y):
        self.step += 1
        parts = {"loss/error": (pred-y).square().mean()}
        if self.step % 3: parts["loss/size"] = .01*pred.abs().mean()
        self.terms = {k: v.detach() for k,v in parts.items()}
        return sum(parts.values())

class At(Callback):
    "Call `fn(learn)` after step `step`, as a checkpoint would be written"
    order = 88
    def __init__(self, step, fn): self.step,self.fn = step,fn
    def after_batch(self):
        if self.train_iter == self.step: self.fn(self.learn)

def toy(*cbs, n=66, bs=12):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    y = x@torch.tensor([[2.], [-1.]])
    torch.manual_seed(0)
    dls = Loaders(Batches(n, lambda i,f: (x[i], y[i]), bs))
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    usual = [ClipGrad(), LRSchedule(20, "cosine", 3), DataParallel(), MaxSteps(20)]
    return StepLearner(dls, nn.Linear(2, 1), Loss(), opt_func=sgd, lr=.1, cbs=[*usual, *cbs])

def rows(path, stage="toy"): return {k: v for k,v in read_log(path)[stage].items() if k not in CLOCKS}
def close(a, b): # Six digits are written
    assert a.keys() == b.keys()
    for k in a:
        assert [s for s,_ in a[k]] == [s for s,_ in b[k]]
        assert [v for _,v in a[k]] == pytest.approx([v for _,v in b[k]], rel=1e-5, abs=1e-7), k

def on_two(folder):
    "Two processes out of this one: log 20 steps, keep the state of step 10"
    import torch._dynamo # As DistributedDataParallel would, for 7 s in each of them; fastai, too, is imported once
    children = []
    for r in range(2):
        pid = os.fork()
        if pid == 0: log_as(r, folder) # And end
        children.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))

def log_as(rank, folder):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    for fd,name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder/f"{name}{rank}.txt", os.O_CREAT|os.O_WRONLY), fd)
    def keep(learn):
        state = training_state(learn)
        if is_first(): torch.save(state, folder/"state.pt")
    code = 1
    try:
        with joined(torch.device("cpu")):
            log = TermsLog(folder/"two.csv", "toy", every=4, flops_per_image=12, peak=(1e9, "a guess"))
            fit_steps(toy(log, StepBar(20, "toy"), At(10, keep)), 20)
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "That, without a terminal"
    d = tmp_path_factory.mktemp("two")
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | together(2) | dict(PYTHONPATH=here, PYTHONWARNINGS="ignore")
    code = f"from pathlib import Path; from test_logs import on_two; on_two(Path({str(d)!r}))"
    r = subprocess.run([sys.executable, "-c", code], env=env, timeout=900)
    said = [[(d/f"{name}{k}.txt").read_text(encoding="utf-8") for name in ("out", "err")] for k in range(2)]
    assert r.returncode == 0, said
    return d, said

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The unbroken run on one process"
    p = tmp_path_factory.mktemp("one")/"log.csv"
    fit_steps(toy(TermsLog(p, "toy", every=4)), 20)
    return rows(p)

def test_two_processes_leave_the_log_of_one(two, one):
    close(rows(two[0]/"two.csv"), one)
    rate, mfu = (read_log(two[0]/"two.csv")["toy"][k] for k in ("images_per_second", "mfu"))
    assert [v for _,v in mfu] == pytest.approx([v*12/1e9/2 for _,v in rate], rel=1e-4) # Of two devices

def test_a_run_of_two_processes_goes_on_on_one(two, one, tmp_path):
    p = tmp_path/"log.csv"
    p.write_bytes((two[0]/"two.csv").read_bytes())
    state = torch.load(two[0]/"state.pt", weights_only=True)
    assert state["callbacks"]["TermsLog"]["count"] == 2 and state["callbacks"]["TermsLog"]["items"] == 24
    fit_steps(toy(TermsLog(p, "toy", every=4), Resume(state)), 20)
    close(rows(p), one)

def test_lines_without_a_terminal_and_from_the_first_process_only(two):
    (out, err), (out1, err1) = two[1]
    under_way, last = r"toy: \d+/20 steps, [\d.,]+ steps/s, .*\n", r"toy: 20/20 steps, [\d.,]+ steps/s, in \d+ s, "
    assert re.fullmatch(f"({under_way})*{last}"+r"[\d,]+ images/s, loss [\d.e-]+\n", err), repr(err)
    assert out1 == err1 == "" and out == "mfu is the share of 0.001 TFLOP/s on each of 2 devices, a guess\n"

def keep(states): return lambda learn: states.append(copy.deepcopy(training_state(learn)))
def die(learn): raise KeyboardInterrupt

# In the middle of a row, at its end, after the last, whole and partial
ACCIDENTS = [(10, 13, 4), (8, 8, 4), (8, 17, 4), (1, 4, 4), (20, 20, 4), (20, 20, 6)]

@pytest.mark.parametrize("at,killed,every", ACCIDENTS)
def test_a_killed_and_continued_run_leaves_the_log_of_the_unbroken_one(at, killed, every, tmp_path):
    p, states = tmp_path/"log.csv", []
    fit_steps(toy(TermsLog(tmp_path/"unbroken.csv", "toy", every)), 20)
    one = rows(tmp_path/"unbroken.csv")
    p.write_text("stage,step,seconds,term,value\nother,99,1.0,loss,0.5\n", encoding="utf-8")
    accident = [At(killed, die)] if killed < 20 else []
    try: fit_steps(toy(TermsLog(p, "toy", every), At(at, keep(states)), *accident), 20)
    except KeyboardInterrupt: # And in the middle of a write
        p.write_text(p.read_text(encoding="utf-8")+"toy,20,1.0,lo", encoding="utf-8")
    again = TermsLog(p, "toy", every)
    fit_steps(toy(again, Resume(states[0])), 20)
    assert rows(p) == one and read_log(p)["other"] == dict(loss=[(99, .5)])
    assert [(r["step"], float(f"{r['loss']:.6g}")) for r in again.history] == one["loss"]
    seconds = [float(line.split(",")[2]) for line in p.read_text(encoding="utf-8").splitlines()[2:]]
    assert sorted(seconds) == seconds # They go on

def test_tensorboard_holds_the_rows_of_the_csv(tmp_path):
    states, p = [], tmp_path/"log.csv"
    def log(): return TermsLog(p, "toy", every=4, writers=[TensorBoardWriter(tmp_path/"tensorboard"/"toy")])
    with pytest.raises(KeyboardInterrupt): fit_steps(toy(log(), At(10, keep(states)), At(14, die)), 20)
    fit_steps(toy(log(), Resume(states[0])), 20)
    events = EventAccumulator(str(tmp_path/"tensorboard"/"toy")).Reload()
    csv = read_log(p)["toy"]
    assert set(events.Tags()["scalars"]) == set(csv)
    for k,points in csv.items():
        assert [e.step for e in events.Scalars(k)] == [s for s,_ in points] == [4, 8, 12, 16, 20]
        assert [e.value for e in events.Scalars(k)] == pytest.approx([v for _,v in points], rel=1e-5)

def test_wandb_gets_the_rows_and_a_continued_run_is_the_same_one(tmp_path, monkeypatch):
    calls = []
    class Run:
        def log(self, row, step): calls.append((step, row["loss"]))
        def finish(self): calls.append("finish")
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    def init(**kw):
        calls.append(kw)
        return Run()
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    states = []
    def log(): return TermsLog(every=10, writers=[WandbWriter("vavae", "toy-run", tmp_path/"wandb"/"toy")])
    fit_steps(toy(log(), At(10, keep(states))), 20)
    first, *logged, end = calls
    assert (first["project"], first["name"], first["resume"]) == ("vavae", "toy-run", "allow")
    assert ([step for step,_ in logged], end) == ([10, 20], "finish")
    calls.clear()
    fit_steps(toy(log(), Resume(states[0])), 20)
    assert calls == [first, logged[1], "finish"]
    calls.clear()
    fit_steps(toy(log()), 20)
    assert calls[0]["id"] != first["id"] # Begun anew: another run

def test_cutting_a_log_that_is_not_there_or_is_cut_short(tmp_path):
    cut_log(tmp_path/"log.csv", "dit")
    assert not (tmp_path/"log.csv").exists()
    lines = "stage,step,seconds,term,value", "dit,4,0.1,loss,2", "dit,8,0.2,loss,1", "dit,12"
    (tmp_path/"log.csv").write_text("\n".join(lines), encoding="utf-8")
    cut_log(tmp_path/"log.csv", "dit", 8)
    assert read_log(tmp_path/"log.csv") == dict(dit=dict(loss=[(4, 2.)]))
