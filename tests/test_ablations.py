"""The ablation lab: rows differ in exactly what they say, results are never mixed, and the command fills a table."""
import json, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from together import usual_signals
from vavae_nb.base.errors import ConfigError, DataError
from vavae_nb.base.stopping import RunBusy, RunLock
from vavae_nb.paper import runs
from vavae_nb.paper.figures import every_tokenizer, plot_convergence, plot_dilemma, plot_frontier, plot_predictors
from vavae_nb.paper.figures import plot_samples, plot_sizes, plot_steps, plot_tsne
from vavae_nb.paper.rendering import render, table_cells
from vavae_nb.paper.results import figures, load_table
from vavae_nb.paper.tables import configuration, scales, tables
from vavae_nb.recipes.config import flat
from vavae_nb.recipes.settings import differences

def row(table, name): return next(r for r in tables[table].rows if r.name == name)

def changed(scale, a, b):
    "What the second row sets otherwise than the first"
    found = differences(configuration(a, scale), configuration(b, scale))
    return {setting: after for setting,(_, after) in found.items() if setting != "recipe"}

# What each row is about, written down once more and apart from the recipes

@pytest.mark.parametrize("scale", scales)
def test_rows_of_table_2(scale):
    dims = {"f16d16": 16, "f16d32": 32, "f16d64": 64} if scale == "paper" else {"f16d16": 8, "f16d32": 16, "f16d64": 32}
    vfm = "dinov2" if scale == "paper" else "efficientnet_lite0"
    first = row("table2", "f16d16-none-b")
    for spec,dim in dims.items():
        none = row("table2", f"{spec}-none-b")
        assert changed(scale, first, none) == ({} if spec == "f16d16" else {"tokenizer.latent_dim": dim})
        assert changed(scale, none, row("table2", f"{spec}-dinov2-b")) == {"foundation.name": vfm}
        assert changed(scale, none, row("table2", f"{spec}-mae-b")) == {"foundation.name": "mae"}

@pytest.mark.parametrize("scale", scales)
def test_rows_of_tables_4_and_5(scale):
    full = row("table5", "f16d32-dinov2-b")
    without = {"nomcos": {"vf.cos_weight": 0.}, "nomdms": {"vf.distmat_weight": 0.},
               "nomargin": {"vf.cos_margin": 0., "vf.distmat_margin": 0.}}
    for part,change in without.items():
        assert changed(scale, full, row("table5", f"f16d32-dinov2-{part}-b")) == change
    for vfm in ("sam", "clip"):
        assert changed(scale, full, row("table4", f"f16d32-{vfm}-b")) == {"foundation.name": vfm}

@pytest.mark.parametrize("scale", scales)
def test_controls(scale):
    full, none = row("controls", "f16d64-dinov2-b"), row("controls", "f16d64-none-b")
    controls = {"random": {"foundation.weights": "random"}, "shuffled": {"foundation.control": "shuffled"},
                "lowpass": {"foundation.control": "lowpass"}}
    for name,change in controls.items():
        assert changed(scale, full, row("controls", f"f16d64-dinov2-b-{name}")) == change
    for w in ("1e-3", "1e-2"):
        control = row("controls", f"f16d64-none-b-kl{w}")
        assert changed(scale, none, control) == {"tokenizer_training.kl_weight": float(w)}

@pytest.mark.parametrize("scale", scales)
def test_rows_of_table_1_change_one_thing_each(scale):
    rows = tables["table1"].rows
    settings = [set(changed(scale, a, b)) for a,b in zip(rows, rows[1:])]
    if scale == "smoke":
        for names in settings: names.discard("dit_training.warmup") # So few steps shorten warm-ups
    assert settings[:8] == [
        {"dit_training.path", "dit.learn_sigma", "sampling.solver"},
        {"dit_training.batch_size", "dit_training.lr", "dit_training.steps"},
        {"dit_training.betas"}, {"dit_training.times"}, {"dit_training.direction_weight"},
        {"dit.swiglu"}, {"dit.rmsnorm"}, {"dit.rope"}]
    assert settings[8] >= {"dit.patch_size", "tokenizer.latent_dim", "foundation.name"}
    assert not any(name.startswith(("dit.", "dit_training.")) for name in settings[8]-{"dit.patch_size"})
    if scale == "smoke": return
    first, _, third, *_, last = (configuration(r, scale).dit_training for r in rows)
    assert first.steps == 4*third.steps and 4*first.batch_size == third.batch_size and 2*first.lr == third.lr
    assert first.steps*first.batch_size == last.steps*last.batch_size

@pytest.mark.parametrize("scale", scales)
def test_lengths_of_figure_4(scale):
    for fig,spec in (("fig4a", "f16d32"), ("fig4b", "f16d64")):
        for vfm in ("none", "dinov2"):
            whole = row("table2", f"{spec}-{vfm}-b")
            for f in (.125, .25, .5):
                part = row(fig, f"{spec}-{vfm}-b-x{f:g}")
                assert set(changed(scale, whole, part)) <= {"dit_training.steps", "dit_training.warmup"}
                if scale == "smoke": continue
                steps = [configuration(r, scale).dit_training.steps for r in (part, whole)]
                assert steps[0] == f*steps[1]
    sizes = [configuration(r, scale).dit for r in tables["fig4c"].rows[:5]]
    assert len(set(map(str, sizes))) == 5

def test_tokenizers_are_shared_where_they_can_be():
    def keys(rows, scale="cpu"): return {runs.tokenizer_key(configuration(r, scale)) for r in rows}
    assert len(keys(tables["fig4a"].rows)) == 2
    assert keys(tables["fig4a"].rows) == keys(row("table2", f"f16d32-{v}-b") for v in ("none", "dinov2"))
    assert [len(keys(tables["table1"].rows, s)) for s in scales] == [2]*4
    assert len(keys(tables["fig4c"].rows)) == 2
    other = {}
    for table in ("table2", "table5", "controls"):
        for r in runs.chosen_rows(table, "cpu"): other[r.name_at("cpu")] = r
    assert len(keys(other.values())) == len(other) == 14 # Nothing else shares one by mistake

def test_a_row_has_one_home():
    homes = {}
    for t in tables.values():
        for r in t.rows: homes.setdefault(r.name, set()).add(r.table)
    assert all(len(h) == 1 for h in homes.values())
    for name,t in tables.items():
        names = {r.name for r in t.rows}
        assert len(names) == len(t.rows)
        assert all(not r.against or r.against in names or name in ("fig2", "table2", "table4") for r in t.rows), name

def test_the_papers_figures():
    expect = {n: row("table2", n).expect for n in ("f16d32-none-b", "f16d64-dinov2-xl")}
    assert (expect["f16d32-none-b"]["gFID"], expect["f16d64-dinov2-xl"]["gFID"]) == (22.62, 11.98)
    table1 = [r.expect["gFID"] for r in tables["table1"].rows]
    assert table1 == [19.5, 17.2, 16.59, 16.61, 13.99, 12.52, 10.1, 9.25, 7.13, 4.29]
    assert row("table6", "f16d64-mae-b").expect["density CV"] == .256
    for table,name in (("fig4a", "f16d32-none-b-x0.5"), ("controls", "f16d64-dinov2-b-random")):
        assert row(table, name).expect == {} # The paper has no such row

# Results

def result(r, scale="cpu", seed=0, fd=500., psnr=26., fingerprint="abc", commit="1"*40, change=None):
    cfg = configuration(r, scale, seed)
    measured = dict(images="samples_unguided", against="train", n=1000, n_reference=5000)
    values = {"efficientnet_lite0": fd, "alexnet": fd-10}
    distances = [measured | dict(network=network, value=value) for network,value in values.items()]
    data = {s: dict(name=f"made up {s}", n=5000, size=32, fingerprint=fingerprint) for s in ("train", "test")}
    return runs.result_heading(r, cfg, scale) | dict(
        status="done",
        reconstruction=dict(psnr=psnr, lpips=.1, ssim=.8),
        generation=dict(fd=distances, sampling=dict(n=1000, points=16)),
        uniformity=dict(density_cv=.2, gini=.1, normalised_entropy=.99, knn_distance_cv=.3),
        latent_std=1.,
        provenance=dict(commit=commit, device="cpu", precision="fp32", data=data),
        config=flat(cfg) | (change or {}),
        tsne=[[float(i), float(i*i % 7)] for i in range(40)])

def put(results, r, *a, scale="cpu", **kw):
    out = result(r, scale, *a, **kw)
    runs.write_result(runs.result_path(results, r, scale, out["seed"]), out)
    return out

def test_the_table_shows_what_the_files_say(tmp_path):
    none, vf = row("table2", "f16d64-none-b"), row("table2", "f16d64-dinov2-b")
    fds = {none.name: [600., 610., 590.], vf.name: [500., 512.]}
    for r in (none, vf):
        for seed,v in enumerate(fds[r.name]): put(tmp_path, r, seed, fd=v, psnr=26+seed/10)
    t = load_table("table2", "cpu", tmp_path)
    assert t[none.name].values["FD efficientnet_lite0"] == dict(enumerate(fds[none.name]))
    assert t["f4d32-lite0-b"].seeds == [0, 1]
    header, rows = table_cells(t)
    cells = {r[0]: dict(zip(header, r)) for r in rows}
    ours = cells["f4d32-lite0-b"]
    assert ours["seeds"] == "2" and ours["PSNR"] == "26.05 ± 0.07 (−0.05)"
    assert ours["FD over EfficientNet-Lite0"] == "506 ± 8 (−94)" and ours["FD over AlexNet"] == "496 ± 8 (−94)"
    assert ours["paper: gFID"] == "24.00 (−12.83)" and ours["paper: rFID"] == "0.14 (−0.03)"
    assert cells["f4d8-lite0-b"]["PSNR"] == "not measured"
    text = render(t)
    assert "| 506 ± 8 (−94) |" in text and "1111111" in text and "compare differences and order, not values" in text

def test_a_column_that_one_seed_lacks_is_of_the_others(tmp_path):
    r = row("table2", "f16d32-none-b")
    for seed in (0, 1): put(tmp_path, r, seed, fd=500.+seed, psnr=26.+seed)
    path = runs.result_path(tmp_path, r, "cpu", 0)
    without = runs.read_result(path)
    del without["uniformity"]["gini"]
    runs.write_result(path, without)
    every, name = every_tokenizer("cpu", tmp_path), r.name_at("cpu")
    assert "Gini" not in every[f"{name}-0"] and every[f"{name}-1"]["Gini"] == .1
    assert [every[f"{name}-{seed}"]["PSNR"] for seed in (0, 1)] == [26., 27.]
    fig = plot_predictors(every, "FD alexnet")
    assert [len(ax.lines) for ax in fig.axes] == [2, 2, 1, 2]

def test_rank_correlation_with_the_paper(tmp_path):
    for i,spec in enumerate(("f16d16", "f16d32", "f16d64")): put(tmp_path, row("fig1", f"{spec}-none-b"), fd=600-10*i)
    header, rows = table_cells(load_table("fig1", "cpu", tmp_path))
    assert dict(zip(header, rows[-1]))["FD over AlexNet"] == "−1.00 (n = 3)"

def test_numbers_of_smoke_runs_are_not_shown(tmp_path):
    put(tmp_path, row("fig1", "f16d16-none-b"), scale="smoke", fd=1234.)
    text = render(load_table("fig1", "smoke", tmp_path))
    assert "ran" in text and "1234" not in text

def test_results_of_other_settings_data_and_commits_are_not_mixed_in_silence(tmp_path):
    r = row("table2", "f16d64-none-b")
    put(tmp_path, r, 0, fd=600.)
    put(tmp_path, r, 1, fd=610.)
    put(tmp_path, r, 2, fd=1., fingerprint="other")
    put(tmp_path, r, 3, fd=2., change={"sampling.points": 3})
    put(tmp_path, r, 4, fd=605., commit="2"*40)
    t = load_table("table2", "cpu", tmp_path)
    assert t[r.name].values["FD efficientnet_lite0"] == {0: 600, 1: 610, 4: 605}
    text = render(t)
    assert re.search(r"left out: f4d32-none-b-2.json, measured on other data .*other", text)
    assert re.search(r"left out: f4d32-none-b-3.json, measured with sampling.points 3 \(now 16\)", text)
    assert "commits: 1111111 (2), 2222222 (1)" in text

def test_a_failed_row_shows_as_failed(tmp_path):
    r = row("table2", "f16d64-none-b")
    failed = runs.result_heading(r, configuration(r, "cpu"), "cpu") | dict(status="failed", error="the disk is full")
    runs.write_result(runs.result_path(tmp_path, r, "cpu", 0), failed)
    t = load_table("table2", "cpu", tmp_path)
    assert not t[r.name].values and "seed 0 failed: the disk is full" in render(t)
    put(tmp_path, r, 1)
    text = render(load_table("table2", "cpu", tmp_path))
    assert "1 (+ failed)" in text and "f4d32-none-b: seed 0 failed: the disk is full" in text

@pytest.mark.parametrize("name", list(tables))
def test_a_table_of_which_nothing_is_measured_says_so(name, tmp_path):
    for scale in ("cpu", "paper"):
        header, rows = table_cells(load_table(name, scale, tmp_path))
        assert {len(r) for r in rows} == {len(header)} and all(r[2] == "not measured" for r in rows[:-1])
    assert "not measured" in render(load_table(name, "cpu", tmp_path))

def test_a_damaged_result_is_named(tmp_path):
    r = row("table2", "f16d64-none-b")
    path = runs.result_path(tmp_path, r, "cpu", 0)
    path.parent.mkdir(parents=True)
    for text in ('{"status": "do', "[]", '{"status": "odd"}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"{path.name} is no result"): load_table("table2", "cpu", tmp_path)

# The runner, with the run itself left out

@pytest.fixture
def runner(tmp_path, monkeypatch):
    ran, trouble = [], {}
    def run_row(r, cfg, scale, runs, stop):
        ran.append((r.name_at(scale), cfg.seed))
        if e := trouble.pop(r.name_at(scale), None): raise e
        return tmp_path
    monkeypatch.setattr(runs, "run_row", run_row)
    monkeypatch.setattr(runs, "result_of", lambda r, cfg, scale, run: result(r, scale, cfg.seed))
    monkeypatch.setattr(runs, "save_picture", lambda run, path: None)
    monkeypatch.setattr(runs.time, "sleep", lambda s: None)
    def run(rows, **kw): return runs.run_rows(rows, "cpu", results=tmp_path/"results", runs=tmp_path/"runs", **kw)
    return run, ran, trouble, tmp_path/"results"

def test_done_rows_are_skipped_and_failed_ones_tried_again(runner):
    run, ran, trouble, results = runner
    rows = runs.chosen_rows("fig1", "cpu")
    trouble["f4d16-none-b"] = RuntimeError("out of memory")
    assert [p.name for p in run(rows, seeds=[0, 1])] == ["f4d16-none-b-0.json"]
    # Each seed of all rows before the next
    assert len(ran) == 6 and ran[:3] == [("f4d8-none-b", 0), ("f4d16-none-b", 0), ("f4d32-none-b", 0)]
    failed = runs.read_result(results/"table2"/"cpu"/"f4d16-none-b-0.json")
    assert failed["error"] == "RuntimeError: out of memory"
    ran.clear()
    assert run(rows, seeds=[0, 1]) == [] and ran == [("f4d16-none-b", 0)]
    ran.clear()
    assert run(rows, seeds=[0, 1]) == [] and ran == []
    assert run(rows[:1], force=True) == [] and ran == [("f4d8-none-b", 0)]

def test_a_result_is_not_overwritten_by_other_settings_or_a_failure(runner):
    run, ran, trouble, results = runner
    r = runs.chosen_rows("fig1", "cpu")[0]
    put(results, r, change={"sampling.points": 3})
    with pytest.raises(ConfigError, match="other settings .sampling.points 3 there, 16 now"): run([r])
    trouble[r.name_at("cpu")] = RuntimeError("no")
    assert len(run([r], force=True)) == 1
    assert runs.read_result(runs.result_path(results, r, "cpu", 0))["status"] == "done"

def test_a_busy_row_is_left_to_the_other_process(runner):
    run, ran, trouble, results = runner
    rows = runs.chosen_rows("fig1", "cpu")
    trouble["f4d8-none-b"] = RunBusy("is being written by process 1")
    assert run(rows) == [] and [n for n,_ in ran] == ["f4d8-none-b", "f4d16-none-b", "f4d32-none-b", "f4d8-none-b"]

def test_a_stop_is_no_failure(runner):
    run, ran, trouble, results = runner
    trouble["f4d8-none-b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): run(runs.chosen_rows("fig1", "cpu"))
    assert not list(results.rglob("*.json"))

def test_the_lock_says_busy(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunBusy, match="being written by process"): RunLock(tmp_path).__enter__()

def test_unknown_names(tmp_path):
    for args,error in ((("table9", "cpu"), "table 'table9'; did you mean"),
                       (("table1", "cpuu"), "scale 'cpuu'; did you mean 'cpu'"),
                       (("table2", "cpu", ["f4d33-none-b"]), "did you mean 'f4d32-none-b'")):
        with pytest.raises(ConfigError, match=error): runs.chosen_rows(*args)
    with pytest.raises(ConfigError, match="did you mean 'f4d32-none-b'"):
        load_table("table2", "cpu", tmp_path)["f4d33-none-b"]

# Figures from made-up results

def test_figures_need_results_and_show_them(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt, numpy as np
    from PIL import Image
    def load(table): return load_table(table, "cpu", tmp_path)
    def drawn(fig): return [line.get_ydata().tolist() for ax in fig.axes for line in ax.lines]
    with pytest.raises(DataError, match="run python -m vavae_nb.ablations fig1 --scale cpu"): plot_dilemma(load("fig1"))
    for table in ("fig1", "fig2", "fig4a", "fig4c", "table1", "controls", "table5"):
        for i,r in enumerate(runs.chosen_rows(table, "cpu")):
            put(tmp_path, r, fd=500+7*i, psnr=25+i)
            put(tmp_path, r, 1, fd=510+7*i, psnr=25+i)
    t = load("fig1")
    assert [f.mean("FD alexnet") for f in t.rows] in drawn(plot_dilemma(t))
    for plot,table in ((plot_frontier, "fig2"), (plot_convergence, "fig4a"), (plot_sizes, "fig4c")):
        t, shown = load(table), set()
        for y in drawn(plot(t)): shown |= {round(v, 6) for v in np.ravel(y)}
        assert {round(f.mean("FD alexnet"), 6) for f in t.rows if f.values} <= shown, table
    assert plot_steps(load("table1")).axes
    every = every_tokenizer("cpu", tmp_path)
    assert len(every) == 2*14 and plot_predictors(every, "FD alexnet").axes
    assert plot_tsne(["f4d32-none-b", "f4d32-lite0-b"], "cpu", tmp_path).axes
    name = "f4d32-none-b"
    with pytest.raises(DataError, match=f"{name}-0.webp is not there"): plot_samples([name], "cpu", tmp_path)
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"): plot_samples(["f4d33-none-b"], "cpu", tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/"table2"/"cpu"/f"{name}-0.webp")
    ax, = plot_samples([name], "cpu", tmp_path, classes=["cat", "dog"]).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"] and list(ax.get_yticks()) == [2., 6.]
    plt.close("all")

# What is committed

ROOT = Path(__file__).resolve().parent.parent
@pytest.mark.parametrize("path", sorted((ROOT/"results").glob("*/cpu/*.json")), ids=lambda p: p.stem)
def test_committed_results_are_whole(path):
    r = runs.read_result(path)
    home = next(row for row in tables[r["table"]].rows if row.name_at("cpu") == r["row"])
    assert r["status"] == "done" and path == runs.result_path(ROOT/"results", home, "cpu", r["seed"])
    p = r["provenance"]
    assert re.fullmatch("[0-9a-f]{40}", p["commit"]) and p["data"]["train"]["fingerprint"]
    assert r["config"]["seed"] == r["seed"] and path.with_suffix(".webp").exists()
    assert all(f["extractor"] and f["reference"] and f["n"] for f in r["generation"]["fd"])
    assert "/work" not in path.read_text(encoding="utf-8")

def test_the_list_of_results_is_up_to_date():
    sys.path.insert(0, str(ROOT/"tools"))
    from inventory import listed
    text = (ROOT/"results"/"README.md").read_text(encoding="utf-8")
    assert "<!-- inventory -->" in text and listed(text) == text, "run python tools/inventory.py"

# The command, for real

def cli(*args, cwd=None):
    command = [sys.executable, "-m", "vavae_nb.ablations", *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900, cwd=cwd)

def test_a_dry_run_plans_and_does_nothing(tmp_path):
    r = cli("fig4a", "--scale", "cpu", "--dry-run", cwd=tmp_path)
    assert r.returncode == 0 and not list(tmp_path.iterdir())
    assert re.search(r"f4d16-none-b-x0.25, seed 0 .* to run, tokenizer shared", r.stdout) and "one H800" in r.stdout
    bad = cli("tabel2", "--dry-run", cwd=tmp_path)
    assert bad.returncode == 2 and "did you mean 'table2'" in bad.stderr and "Traceback" not in bad.stderr

def test_the_dilemma_in_smoke(tmp_path):
    r = cli("fig1", "--scale", "smoke", cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    assert re.findall(r"^\| (\S+) \| 1 \| ran \|", r.stdout, re.M) == ["f4d8-none-b", "f4d16-none-b", "f4d32-none-b"]
    done = sorted((tmp_path/"results"/"table2"/"smoke").iterdir())
    # 20 samples make no picture of ten per class
    assert [p.name for p in done] == [f"f4d{d}-none-b-0.json" for d in (16, 32, 8)]
    one = json.loads(done[0].read_text(encoding="utf-8"))
    assert one["status"] == "done" and one["provenance"]["commit"]
    assert figures(one)["PSNR"] > 0 and one["config"]["tokenizer.latent_dim"] == 16
    before = {p: p.read_bytes() for p in done}
    again = cli("fig1", "--scale", "smoke", cwd=tmp_path)
    assert again.returncode == 0 and "train the tokenizer" not in again.stdout
    assert {p: p.read_bytes() for p in done} == before

@pytest.mark.slow
@pytest.mark.parametrize("table", tables)
def test_every_table_in_smoke(tmp_path_factory, table):
    work = tmp_path_factory.getbasetemp()/"lab" # Shared, as rows are
    work.mkdir(exist_ok=True)
    r = cli(table, "--scale", "smoke", cwd=work)
    assert r.returncode == 0, r.stderr[-2000:]
    assert "not measured" not in r.stdout and "failed" not in r.stdout

@pytest.mark.slow
def test_stopped_jobs_go_on(tmp_path):
    args = [sys.executable, "-m", "vavae_nb.ablations", "fig2", "--scale", "smoke", "--jobs", "2"]
    p = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                         preexec_fn=usual_signals)
    deadline = time.time()+300
    while not list(tmp_path.glob("results/*/smoke/*.json")) and time.time() < deadline: time.sleep(.5)
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=600)[0]
    assert p.returncode == 143, out
    results = [runs.read_result(path) for path in tmp_path.glob("results/*/smoke/*.json")]
    assert 0 < len(results) < 6 and not any(result["status"] == "failed" for result in results)
    r = cli(*args[3:], cwd=tmp_path)
    ran = re.findall(r"^\| \S+ \| 1 \| ran \|", r.stdout, re.M)
    assert r.returncode == 0 and len(ran) == 6, r.stdout+r.stderr
    assert not list(tmp_path.rglob("run.lock"))
