"""The ablation lab: rows differ in exactly what they say, results are never mixed, and the command fills a table."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from together import usual_signals
from vavae_nb.paper import results as filling, runs
from vavae_nb.paper.tables import configuration, scales, tables
from vavae_nb.base.stopping import RunBusy, RunLock
from vavae_nb.recipes.settings import differences
from vavae_nb.recipes.config import flat
from vavae_nb.base.errors import ConfigError, DataError
from vavae_nb.paper.figures import every_tokenizer, plot_convergence, plot_dilemma, plot_frontier, plot_predictors, plot_samples, plot_sizes, plot_steps, plot_tsne

row = lambda table, name: next(r for r in tables[table].rows if r.name == name)
def changed(scale, a, b): return {k: v[1] for k,v in differences(configuration(a, scale), configuration(b, scale)).items() if k != "recipe"}
small = ("smoke", "cpu", "gpu")

# What each row is about, written down once more and apart from the recipes

@pytest.mark.parametrize("scale", scales)
def test_rows_of_table_2(scale):
    d = dict(zip(("f16d16", "f16d32", "f16d64"), (16, 32, 64) if scale == "paper" else (8, 16, 32)))
    vfm = "dinov2" if scale == "paper" else "efficientnet_lite0"
    none = row("table2", "f16d16-none-b")
    for spec,dim in d.items():
        assert changed(scale, none, row("table2", f"{spec}-none-b")) == ({} if spec == "f16d16" else {"tokenizer.latent_dim": dim})
        assert changed(scale, row("table2", f"{spec}-none-b"), row("table2", f"{spec}-dinov2-b")) == {"foundation.name": vfm}
        assert changed(scale, row("table2", f"{spec}-none-b"), row("table2", f"{spec}-mae-b")) == {"foundation.name": "mae"}

@pytest.mark.parametrize("scale", scales)
def test_rows_of_tables_4_and_5(scale):
    full = row("table5", "f16d32-dinov2-b")
    for part,change in dict(nomcos={"vf.cos_weight": 0.}, nomdms={"vf.distmat_weight": 0.}, nomargin={"vf.cos_margin": 0., "vf.distmat_margin": 0.}).items():
        assert changed(scale, full, row("table5", f"f16d32-dinov2-{part}-b")) == change
    for vfm in ("sam", "clip"): assert changed(scale, full, row("table4", f"f16d32-{vfm}-b")) == {"foundation.name": vfm}

@pytest.mark.parametrize("scale", scales)
def test_controls(scale):
    full, none = row("controls", "f16d64-dinov2-b"), row("controls", "f16d64-none-b")
    for name,change in dict(random={"foundation.weights": "random"}, shuffled={"foundation.control": "shuffled"}, lowpass={"foundation.control": "lowpass"}).items():
        assert changed(scale, full, row("controls", f"f16d64-dinov2-b-{name}")) == change
    for w in ("1e-3", "1e-2"): assert changed(scale, none, row("controls", f"f16d64-none-b-kl{w}")) == {"tokenizer_training.kl_weight": float(w)}

@pytest.mark.parametrize("scale", scales)
def test_rows_of_table_1_change_one_thing_each(scale):
    rows, d = tables["table1"].rows, "dit_training."
    keys = [set(changed(scale, a, b))-({d+"warmup"} if scale == "smoke" else set()) for a,b in zip(rows, rows[1:])] # So few steps shorten warm-ups
    assert keys[:8] == [{d+"path", "dit.learn_sigma", "sampling.solver"}, {d+"batch_size", d+"lr", d+"steps"}, {d+"betas"}, {d+"times"}, {d+"direction_weight"}, {"dit.swiglu"}, {"dit.rmsnorm"}, {"dit.rope"}]
    assert keys[8] >= {"dit.patch_size", "tokenizer.latent_dim", "foundation.name"} and not any(k.startswith(d) or k.startswith("dit.") and k != "dit.patch_size" for k in keys[8])
    steps = [configuration(r, scale).dit_training for r in rows]
    if scale != "smoke":
        assert steps[0].steps == 4*steps[2].steps and 4*steps[0].batch_size == steps[2].batch_size and 2*steps[0].lr == steps[2].lr
        assert steps[0].steps*steps[0].batch_size == steps[9].steps*steps[9].batch_size

@pytest.mark.parametrize("scale", scales)
def test_lengths_of_figure_4(scale):
    for fig,spec in (("fig4a", "f16d32"), ("fig4b", "f16d64")):
        for vfm in ("none", "dinov2"):
            whole = row("table2", f"{spec}-{vfm}-b")
            for f in (.125, .25, .5):
                part = row(fig, f"{spec}-{vfm}-b-x{f:g}")
                assert set(changed(scale, whole, part)) <= {"dit_training.steps", "dit_training.warmup"}
                if scale != "smoke": assert configuration(part, scale).dit_training.steps == f*configuration(whole, scale).dit_training.steps
    sizes = [configuration(r, scale).dit for r in tables["fig4c"].rows[:5]]
    assert len(set(map(str, sizes))) == 5

def test_tokenizers_are_shared_where_they_can_be():
    key = lambda r, scale="cpu": runs._hash(runs._settings(runs.tokenizer_part(configuration(r, scale))))
    assert len({key(r) for r in tables["fig4a"].rows}) == 2 and {key(r) for r in tables["fig4a"].rows} == {key(row("table2", f"f16d32-{v}-b")) for v in ("none", "dinov2")}
    assert [len({key(r, s) for r in tables["table1"].rows}) for s in scales] == [2]*4
    assert len({key(r) for r in tables["fig4c"].rows}) == 2
    every = {r.name_at("cpu"): r for t in tables.values() for r in t.rows if any(r in runs.chosen_rows(k, "cpu") for k in ("table2", "table5", "controls"))}
    assert len({key(r) for r in every.values()}) == len({n for n in every}) == 14 # Nothing else shares one by mistake

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
    assert [r.expect["gFID"] for r in tables["table1"].rows] == [19.5, 17.2, 16.59, 16.61, 13.99, 12.52, 10.1, 9.25, 7.13, 4.29]
    assert row("table6", "f16d64-mae-b").expect["density CV"] == .256
    assert row("fig4a", "f16d32-none-b-x0.5").expect == {} and row("controls", "f16d64-dinov2-b-random").expect == {} # The paper has no such row

# Results

def result(r, scale="cpu", seed=0, fd=500., psnr=26., fingerprint="abc", commit="1"*40, change=None):
    cfg = configuration(r, scale, seed)
    rows = [dict(images="samples_unguided", against="train", network=n, value=v, n=1000, n_reference=5000) for n,v in (("efficientnet_lite0", fd), ("alexnet", fd-10))]
    data = {s: dict(name=f"made up {s}", n=5000, size=32, fingerprint=fingerprint) for s in ("train", "test")}
    return runs._head(r, cfg, scale) | dict(status="done", reconstruction=dict(psnr=psnr, lpips=.1, ssim=.8), generation=dict(fd=rows, sampling=dict(n=1000, points=16)), latent_std=1.,
        uniformity=dict(density_cv=.2, gini=.1, normalised_entropy=.99, knn_distance_cv=.3), provenance=dict(commit=commit, device="cpu", precision="fp32", data=data), config=flat(cfg) | (change or {}),
        tsne=[[float(i), float(i*i % 7)] for i in range(40)])

def put(results, r, *a, scale="cpu", **kw):
    out = result(r, scale, *a, **kw)
    runs._write(runs.result_path(results, r, scale, out["seed"]), out)
    return out

def test_the_table_shows_what_the_files_say(tmp_path):
    none, vf = row("table2", "f16d64-none-b"), row("table2", "f16d64-dinov2-b")
    fds = {none.name: [600., 610., 590.], vf.name: [500., 512.]}
    for r in (none, vf):
        for seed,v in enumerate(fds[r.name]): put(tmp_path, r, seed, fd=v, psnr=26+seed/10)
    t = filling.load_table("table2", "cpu", tmp_path)
    assert t[none.name].values["FD efficientnet_lite0"] == fds[none.name] and t["f4d32-lite0-b"].seeds == [0, 1]
    header, rows = filling.table_cells(t)
    cells = {r[0]: dict(zip(header, r)) for r in rows}
    ours = cells["f4d32-lite0-b"]
    assert ours["FD over EfficientNet-Lite0"] == "506 ± 8 (−94)" and ours["FD over AlexNet"] == "496 ± 8 (−94)" and ours["PSNR"] == "26.05 ± 0.07 (−0.05)" and ours["seeds"] == "2"
    assert ours["paper: gFID"] == "24.00 (−12.83)" and ours["paper: rFID"] == "0.14 (−0.03)" and cells["f4d8-lite0-b"]["PSNR"] == "not measured"
    for form,what in (("markdown", "| 506 ± 8 (−94) |"), ("html", "<td>506 ± 8 (−94)</td>"), ("latex", r"& 506 $\pm$ 8 ($-$94) &")): assert what in filling.render(t, form), form
    assert "1111111" in filling.render(t) and "compare differences and order, not values" in filling.render(t)
    with pytest.raises(ConfigError, match="form 'pdf'"): filling.render(t, "pdf")

def test_rank_correlation_with_the_paper(tmp_path):
    for i,spec in enumerate(("f16d16", "f16d32", "f16d64")): put(tmp_path, row("fig1", f"{spec}-none-b"), fd=600-10*i)
    header, rows = filling.table_cells(filling.load_table("fig1", "cpu", tmp_path))
    assert dict(zip(header, rows[-1]))["FD over AlexNet"] == "−1.00 (n = 3)"

def test_numbers_of_smoke_runs_are_not_shown(tmp_path):
    put(tmp_path, row("fig1", "f16d16-none-b"), scale="smoke", fd=1234.)
    text = filling.render(filling.load_table("fig1", "smoke", tmp_path))
    assert "ran" in text and "1234" not in text

def test_results_of_other_settings_data_and_commits_are_not_mixed_in_silence(tmp_path):
    r = row("table2", "f16d64-none-b")
    put(tmp_path, r, 0, fd=600.); put(tmp_path, r, 1, fd=610.)
    put(tmp_path, r, 2, fd=1., fingerprint="other")
    put(tmp_path, r, 3, fd=2., change={"sampling.points": 3})
    put(tmp_path, r, 4, fd=605., commit="2"*40)
    t = filling.load_table("table2", "cpu", tmp_path)
    assert t[r.name].values["FD efficientnet_lite0"] == [600, 610, 605]
    text = filling.render(t)
    assert re.search(r"left out: f4d32-none-b-2.json, measured on other data .*other", text) and re.search(r"left out: f4d32-none-b-3.json, measured with sampling.points 3 \(now 16\)", text)
    assert "commits: 1111111 (2), 2222222 (1)" in text

def test_a_failed_row_shows_as_failed(tmp_path):
    r = row("table2", "f16d64-none-b")
    runs._write(runs.result_path(tmp_path, r, "cpu", 0), runs._head(r, configuration(r, "cpu"), "cpu") | dict(status="failed", error="the disk is full"))
    t = filling.load_table("table2", "cpu", tmp_path)
    assert not t[r.name].values and "seed 0 failed: the disk is full" in filling.render(t)
    put(tmp_path, r, 1)
    text = filling.render(filling.load_table("table2", "cpu", tmp_path))
    assert "1 (+ failed)" in text and "f4d32-none-b: seed 0 failed: the disk is full" in text

@pytest.mark.parametrize("name", list(tables))
def test_a_table_of_which_nothing_is_measured_says_so(name, tmp_path):
    for scale in ("cpu", "paper"):
        header, rows = filling.table_cells(filling.load_table(name, scale, tmp_path))
        assert {len(r) for r in rows} == {len(header)} and all(r[2] == "not measured" for r in rows[:-1])
    assert "not measured" in filling.render(filling.load_table(name, "cpu", tmp_path))

def test_a_damaged_result_is_named(tmp_path):
    r = row("table2", "f16d64-none-b")
    path = runs.result_path(tmp_path, r, "cpu", 0)
    path.parent.mkdir(parents=True)
    for text in ('{"status": "do', "[]", '{"status": "odd"}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"{path.name} is no result"): filling.load_table("table2", "cpu", tmp_path)

# The runner, with the run itself left out

@pytest.fixture
def runner(tmp_path, monkeypatch):
    ran, trouble = [], {}
    def run_row(r, cfg, scale, runs, stop):
        ran.append((r.name_at(scale), cfg.seed))
        if (e := trouble.pop(ran[-1][0], None)): raise e
        return tmp_path
    monkeypatch.setattr(runs, "run_row", run_row)
    monkeypatch.setattr(runs, "result_of", lambda r, cfg, scale, run: result(r, scale, cfg.seed))
    monkeypatch.setattr(runs, "_picture", lambda run, path: None)
    monkeypatch.setattr(runs.time, "sleep", lambda s: None)
    return lambda rows, **kw: runs.run_rows(rows, "cpu", results=tmp_path/"results", runs=tmp_path/"runs", **kw), ran, trouble, tmp_path/"results"

def test_done_rows_are_skipped_and_failed_ones_tried_again(runner):
    run, ran, trouble, results = runner
    rows = runs.chosen_rows("fig1", "cpu")
    trouble["f4d16-none-b"] = RuntimeError("out of memory")
    assert [p.name for p in run(rows, seeds=[0, 1])] == ["f4d16-none-b-0.json"]
    assert len(ran) == 6 and ran[:3] == [("f4d8-none-b", 0), ("f4d16-none-b", 0), ("f4d32-none-b", 0)] # Each seed of all rows before the next
    assert json.loads((results/"table2"/"cpu"/"f4d16-none-b-0.json").read_text(encoding="utf-8"))["error"] == "RuntimeError: out of memory"
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

def test_unknown_names():
    for args,error in ((("table9", "cpu"), "table 'table9'; did you mean"), (("table1", "cpuu"), "scale 'cpuu'; did you mean 'cpu'"), (("table2", "cpu", ["f4d33-none-b"]), "did you mean 'f4d32-none-b'")):
        with pytest.raises(ConfigError, match=error): runs.chosen_rows(*args)

# Figures from made-up results

def test_figures_need_results_and_show_them(tmp_path):
    import matplotlib; matplotlib.use("Agg")
    import matplotlib.pyplot as plt, numpy as np
    from PIL import Image
    with pytest.raises(DataError, match="run python -m vavae_nb.ablations fig1 --scale cpu"): plot_dilemma(filling.load_table("fig1", "cpu", tmp_path))
    for t in ("fig1", "fig2", "fig4a", "fig4c", "table1", "controls", "table5"):
        for i,r in enumerate(runs.chosen_rows(t, "cpu")): put(tmp_path, r, fd=500+7*i, psnr=25+i); put(tmp_path, r, 1, fd=510+7*i, psnr=25+i)
    drawn = lambda fig: [l.get_ydata().tolist() for ax in fig.axes for l in ax.lines]
    fd = filling.load_table("fig1", "cpu", tmp_path)
    assert [f.mean("FD alexnet") for f in fd.rows] in drawn(plot_dilemma(fd))
    for plot,t in ((plot_frontier, "fig2"), (plot_convergence, "fig4a"), (plot_sizes, "fig4c")):
        loaded = filling.load_table(t, "cpu", tmp_path)
        shown = {round(v, 6) for y in drawn(plot(loaded)) for v in np.ravel(y)}
        assert {round(f.mean("FD alexnet"), 6) for f in loaded.rows if f.values} <= shown, t
    assert plot_steps(filling.load_table("table1", "cpu", tmp_path)).axes
    every = every_tokenizer("cpu", tmp_path)
    assert len(every) == 2*14 and plot_predictors(every, "FD alexnet").axes
    assert plot_tsne(["f4d32-none-b", "f4d32-lite0-b"], "cpu", tmp_path).axes
    with pytest.raises(DataError, match="f4d32-none-b-0.webp is not there"): plot_samples(["f4d32-none-b"], "cpu", tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/"table2"/"cpu"/"f4d32-none-b-0.webp")
    assert plot_samples(["f4d32-none-b"], "cpu", tmp_path).axes
    plt.close("all")

# What is committed

ROOT = Path(__file__).resolve().parent.parent
@pytest.mark.parametrize("path", sorted((ROOT/"results").glob("*/cpu/*.json")), ids=lambda p: p.stem)
def test_committed_results_are_whole(path):
    r = runs.read_result(path)
    assert r["status"] == "done" and path == runs.result_path(ROOT/"results", next(x for x in tables[r["table"]].rows if x.name_at("cpu") == r["row"]), "cpu", r["seed"])
    p = r["provenance"]
    assert re.fullmatch("[0-9a-f]{40}", p["commit"]) and p["data"]["train"]["fingerprint"] and r["config"]["seed"] == r["seed"] and path.with_suffix(".webp").exists()
    assert all(f["extractor"] and f["reference"] and f["n"] for f in r["generation"]["fd"]) and "/work" not in path.read_text(encoding="utf-8")

def test_the_list_of_results_is_up_to_date():
    sys.path.insert(0, str(ROOT/"tools"))
    from inventory import listed
    text = (ROOT/"results"/"README.md").read_text(encoding="utf-8")
    assert "<!-- inventory -->" in text and listed(text) == text, "run python tools/inventory.py"

# The command, for real

def cli(*args, cwd=None, **kw): return subprocess.run([sys.executable, "-m", "vavae_nb.ablations", *map(str, args)], capture_output=True, encoding="utf-8", timeout=900, cwd=cwd, **kw)

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
    assert [p.name for p in done] == [f"f4d{d}-none-b-0.json" for d in (16, 32, 8)] # 20 samples make no picture of ten a class
    one = json.loads(done[0].read_text(encoding="utf-8"))
    assert one["status"] == "done" and one["provenance"]["commit"] and filling.figures(one)["PSNR"] > 0 and one["config"]["tokenizer.latent_dim"] == 16
    before = {p: p.read_bytes() for p in done}
    again = cli("fig1", "--scale", "smoke", cwd=tmp_path)
    assert again.returncode == 0 and "train the tokenizer" not in again.stdout and {p: p.read_bytes() for p in done} == before

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
    p = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", preexec_fn=usual_signals)
    deadline = time.time()+300
    while not list(tmp_path.glob("results/*/smoke/*.json")) and time.time() < deadline: time.sleep(.5)
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=600)[0]
    assert p.returncode == 143, out
    left = len(list(tmp_path.glob("results/*/smoke/*.json")))
    assert 0 < left < 6 and not any(json.loads(f.read_text(encoding="utf-8"))["status"] == "failed" for f in tmp_path.glob("results/*/smoke/*.json"))
    r = cli(*args[3:], cwd=tmp_path)
    assert r.returncode == 0 and len(re.findall(r"^\| \S+ \| 1 \| ran \|", r.stdout, re.M)) == 6, r.stdout+r.stderr
    assert not list(tmp_path.rglob("run.lock"))
