"""Trainings that are killed at any instant, stopped by a signal, and moved to another number of processes, against the
unbroken one"""
import json, os, subprocess, sys, time
from pathlib import Path
import psutil, pytest

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

def report(folder, kills, *more):
    command = [sys.executable, Path(__file__).parent/"resume_worker.py", folder, str(kills), *more]
    r = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1500,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads((folder/"report.json").read_text(encoding="utf-8"))

def check_kills(r, n): # Two of three at a random moment, one in the middle of writing a checkpoint
    assert r["kills"] == n and r["status"] == 0, r["at"]
    assert r["differ"] == [] # Tokenizer, LightningDiT with its average, bit for bit; the log but for its clock

@pytest.fixture(scope="module")
def few(tmp_path_factory): return report(tmp_path_factory.mktemp("resume"), 3, "stopped")

def test_a_killed_training_goes_on_bit_for_bit(few): check_kills(few["kills"], 3)

def test_a_signal_saves_and_stops(few):
    r = few["stopped"]
    said = r["said"]
    assert r["status"] == 143 and "SIGTERM: saving a checkpoint" in said, said
    assert "stopped by SIGTERM; call the same command again" in said, said
    assert r["steps"] and r["then"] == 0 and "goes on from its checkpoint of step" in said or r["steps"] == [1]
    assert r["differ"] == []

@pytest.fixture(scope="module")
def move(tmp_path_factory): return report(tmp_path_factory.mktemp("moved"), 0, "moved")["moved"]

@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_more_or_fewer(move):
    assert move["status"] == [2, -9], move
    assert "lost the others" in move["said"] and "Traceback" not in move["said"]
    assert move["step"] > 0 and move["on1"] == [0] and move["on3"] == [0, 0, 0]
    # In float32, and Adam makes much of rounding; test_parallel compares in float64
    assert max(move["apart1"], move["apart3"]) < 5e-3, move

@pytest.mark.slow
def test_twenty_kills(tmp_path): check_kills(report(tmp_path, 20)["kills"], 20)

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]
TRAIN = ["-m", "vavae_nb.train", "--recipe", "smoke", "--device", "cpu"]
SMALL = ["--set", "tokenizer.ch=16", "tokenizer.latent_dim=4", "data.limit=100"]

@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers_do_the_whole_run(launcher, tmp_path):
    out = tmp_path/"run"
    args = [*TRAIN, "--out", out, *SMALL, "dit.depth=1", "evaluation.extractors=alexnet"]
    command = [sys.executable, "-m", *launcher, *map(str, args)]
    r = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=1500, env=ONE_THREAD)
    assert r.returncode == 0, r.stdout[-2000:]+r.stderr[-3000:]
    assert r.stdout.count("reconstruction of") == 1 # One of them speaks
    done = set(json.loads((out/"state.json").read_text(encoding="utf-8")))
    assert done == {"tokenizer", "latents", "dit", "sample", "evaluate"}
    assert (out/"samples.npz").exists() and not (out/"run.lock").exists()

@pytest.mark.slow
def test_workers_stop_when_their_launcher_is_killed(tmp_path):
    args = [*TRAIN, "--out", tmp_path/"run", "--stage", "tokenizer", "--steps", "100000", *SMALL, "saving.every=2",
            "foundation.name=none"]
    launcher = subprocess.Popen([sys.executable, "-m", *TORCHRUN, *map(str, args)], env=ONE_THREAD,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def found(): return list((tmp_path/"run"/"checkpoints"/"tokenizer").glob("step-*.json"))
    wait_for(found)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(workers, timeout=300)
    assert len(gone) >= 2 and not alive and found() and not (tmp_path/"run"/"run.lock").exists()

def wait_for(condition, seconds=300):
    end = time.time()+seconds
    while not condition():
        assert time.time() < end
        time.sleep(.1)
