"""Stages of a run that end at the wrong moment, in the wrong folder, with the wrong settings: nothing is trained twice,
nothing of others is touched, nothing is found out late"""
import json, shutil, signal
from contextlib import contextmanager, suppress
import pytest
from vavae_nb import train
from vavae_nb.base.checkpoints import Checkpoints
from vavae_nb.base.errors import CheckpointError, ConfigError, Stopped, VavaeError
from vavae_nb.base.stopping import StopSignals
from vavae_nb.recipes.paper import recipe
from vavae_nb.recipes.settings import override
from vavae_nb.training import report, stages
from vavae_nb.training.run import Run
from vavae_nb.training.stages import run_stages

CONFIG = override(recipe("smoke"), {
    "device": "cpu", "precision": "fp32", "data.limit": 40, "foundation.name": "none", "saving.every": 2,
    "tokenizer.ch": 8, "tokenizer.latent_dim": 4, "tokenizer.ch_mult": (1, 2, 2),
    "tokenizer_training.steps": 4, "tokenizer_training.batch_size": 8,
    "tokenizer_training.lpips_weight": 0., "tokenizer_training.disc_weight": 0.,
    "dit.hidden_size": 32, "dit.depth": 1, "dit.num_heads": 2, "dit_training.steps": 4, "dit_training.batch_size": 8,
    "sampling.n": 20, "sampling.points": 3, "evaluation.extractors": "alexnet", "evaluation.tsne_points": 0})
MODELS = dict(tokenizer="tokenizer.safetensors", dit="dit.safetensors")

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing happened to, as far as its LightningDiT; and how it was before that"
    folder = tmp_path_factory.mktemp("stages")
    for stage in ("tokenizer", "latents"): run_stages(CONFIG, folder/"run", stage)
    shutil.copytree(folder/"run", folder/"before-dit")
    run_stages(CONFIG, folder/"run", "dit")
    return folder

@pytest.fixture
def out(tmp_path): return tmp_path/"run"

def stop(*_, **__): raise Stopped(signal.SIGTERM)
def full(*_, **__): raise OSError(28, "No space left on device")

def after(function): # Stops when the work is done
    def act(*args, **kw):
        function(*args, **kw)
        stop()
    return act

def one_goes(checkpoints):
    checkpoints.files.json(checkpoints.steps()[0]).unlink()
    stop()

def stop_at(place, stage, patch):
    "A signal at this place of this stage"
    finish = Checkpoints.finish
    def at_finish(act):
        def finish_of_any(checkpoints, last):
            if checkpoints.folder.name == stage: act(checkpoints)
            else: finish(checkpoints, last)
        patch.setattr(Checkpoints, "finish", finish_of_any)
    if place == "before the record": patch.setattr(Run, "record", stop)
    if place == "after the record": patch.setattr(Run, "record", after(Run.record))
    if place == "before the checkpoints go": at_finish(stop)
    if place == "when one of them has gone": at_finish(one_goes)
    if place == "while the curves are drawn": patch.setattr(report, "plot_history", stop)

PLACES = ["before the record", "after the record", "before the checkpoints go", "when one of them has gone",
          "while the curves are drawn"]

@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", MODELS)
def test_what_was_trained_is_not_trained_again(whole, out, stage, place, monkeypatch, capsys):
    if stage == "dit": shutil.copytree(whole/"before-dit", out)
    with monkeypatch.context() as patch, suppress(Stopped):
        stop_at(place, stage, patch)
        run_stages(CONFIG, out, stage)
    capsys.readouterr()
    run_stages(CONFIG, out, stage)
    said = capsys.readouterr().out
    assert ("goes on from its checkpoint of step 4" if place == "before the record" else "done before") in said, said
    model = MODELS[stage]
    assert (out/model).exists()
    if stage == "dit": assert (out/model).read_bytes() == (whole/"run"/model).read_bytes()
    assert len(Run(CONFIG, out).checkpoints(stage).steps()) <= 1 # At most the best, if that is not the last

def test_a_picture_that_cannot_be_drawn_ends_nothing(whole, out, monkeypatch):
    shutil.copytree(whole/"before-dit", out)
    for name in ("plot_history", "save_grid"): monkeypatch.setattr(report, name, full)
    with pytest.warns(UserWarning, match=r"curves.png could not be drawn \(OSError.*No space left on device"):
        run_stages(CONFIG, out, "dit")
    with pytest.warns(UserWarning, match="samples.png could not be drawn"): run = run_stages(CONFIG, out, "sample")
    assert {"dit", "sample"} <= run.state.keys()
    assert not (out/"drawn").exists() and (out/"samples.npz").exists()

def test_samples_are_not_drawn_again(whole, out, monkeypatch, capsys):
    shutil.copytree(whole/"run", out)
    with monkeypatch.context() as m, suppress(Stopped):
        m.setattr(Run, "tidy", lambda run: stop() if "sample" in run.state else None)
        run_stages(CONFIG, out, "sample")
    assert (out/"drawn").exists()
    run = run_stages(CONFIG, out, "sample")
    assert "sample: done before" in capsys.readouterr().out
    assert not (out/"drawn").exists() and run.state["sample"]["images"] == 40

def test_a_signal_that_was_lost_is_found_between_two_stages(whole, out):
    shutil.copytree(whole/"before-dit", out)
    class Lost(StopSignals): # Noted after the training, and raised where nobody heard it
        @contextmanager
        def deferred(self):
            with super().deferred(): yield self
            self.signum = signal.SIGTERM
    with pytest.raises(Stopped): run_stages(CONFIG, out, stop=Lost())
    assert set(Run(CONFIG, out).state) == {"tokenizer", "latents", "dit"}

LINKS = ["latents", "checkpoints", "checkpoints/dit", "latents/latents_rank00_shard000.safetensors", "drawn", "log.csv",
         "run.lock"]

@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_or_deleted_through_a_link(whole, out, tmp_path, name):
    shutil.copytree(whole/"before-dit", out)
    theirs = tmp_path/"theirs"
    precious = theirs if "." in name else theirs/"dit"/"step-00000002.json"
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("precious", encoding="utf-8")
    link = out/name
    if link.is_dir(): shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(theirs)
    def files(): return {p: p.read_text(encoding="utf-8") for p in (theirs, *theirs.rglob("*")) if p.is_file()}
    before, refusal = files(), "is a symbolic link to .*; a run writes and deletes only in its own folder"
    for force in (False, True):
        with pytest.raises(ConfigError, match=refusal): run_stages(CONFIG, out, "latents", force=force)
    assert files() == before and "precious" in before.values()

def test_a_run_folder_may_be_a_link_itself(whole, out, tmp_path):
    shutil.copytree(whole/"run", tmp_path/"large disk")
    out.symlink_to(tmp_path/"large disk")
    assert "dit" in run_stages(CONFIG, out, "dit").state

def test_what_killed_processes_left_is_swept(whole, out):
    shutil.copytree(whole/"run", out)
    left = [out/".curves.png.abcd1234.part.png", out/"progress"/".samples-000004.png.x_1y2z3w.part.png",
            out/"latents"/".tmpA1b2C3"]
    mine = out/".notes"
    for p in (*left, mine): p.write_text("half", encoding="utf-8")
    run_stages(CONFIG, out, "dit")
    assert not any(p.exists() for p in left) and mine.exists()

def test_the_others_look_at_a_folder_once_it_is_swept(out, monkeypatch):
    done = []
    monkeypatch.setattr(stages, "sweep_run", lambda folder: done.append("swept"))
    monkeypatch.setattr(stages, "wait", lambda: done.append("waited"))
    monkeypatch.setattr(stages, "Run", stop)
    with pytest.raises(Stopped): run_stages(CONFIG, out)
    assert done == ["swept", "waited"]

def test_a_damaged_record_is_named(whole, out):
    shutil.copytree(whole/"run", out)
    for text in ("{\"tokenizer\": {", "[]", "["*100_000):
        (out/"state.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"state.json .*(restore|remove) it"): run_stages(CONFIG, out)

BAD = [
    "sampling.points=1", "sampling.cfg_interval=1,0.1", "sampling.shift=0", "sampling.n=0", "sampling.n=1",
    "sampling.n=-3", "evaluation.images=0", "evaluation.extractors=", "evaluation.batch_size=0",
    "tokenizer_training.lr=nan", "dit_training.lr=-1", "tokenizer_training.lpips_every=0", "vf.adaptive_every=0",
    "saving.every=0", "dit_training.accumulate=0", "dit_training.accumulate=1000", "data.size=-32",
    "dit_training.ema=2", "dit_training.ema=1", "sampling.cfg_channels=999", "tokenizer_training.disc_width=0",
    "seed=-1", "tokenizer_training.betas=0.5,1", "sampling.cfg_scale=inf", "tokenizer_training.phases={steps: 0}",
    "tokenizer.ch_mult=", "vf.weight=nan"]

@pytest.mark.parametrize("setting", BAD)
def test_a_number_that_no_stage_could_use(setting):
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        train.configuration("smoke", settings={name: value})

REFUSED = [
    {"sampling.solver": "ddim"}, {"vf.project": "sideways"}, {"foundation.normalize": "yes"},
    {"tokenizer.start": "zero"},
    {"dit_training.path": "vp", "sampling.solver": "euler", "dit_training.prediction": "nosuch"}, {"dit.num_heads": 5},
    {"dit.patch_size": 3}, {"dit_training.path": "ddpm"}, {"evaluation.extractors": "alexnett"}]

@pytest.mark.parametrize("changes", REFUSED)
def test_what_a_later_stage_would_refuse_is_refused_first(out, changes):
    with pytest.raises(VavaeError): run_stages(override(CONFIG, changes), out)
    assert not (out/"tokenizer.safetensors").exists() and not (out/"log.csv").exists()

def test_a_run_begins_without_a_word_of_its_rehearsal(whole, out, capfd):
    shutil.copytree(whole/"before-dit", out)
    run_stages(CONFIG, out, "latents")
    said = capfd.readouterr()
    assert "latents: done before" in said.out and "sampling" not in said.out+said.err

def flip(path): # One bit, in the middle
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    path.write_bytes(raw)

def test_a_flipped_bit_in_latents_is_made_again(whole, out):
    shutil.copytree(whole/"run", out)
    shard = out/"latents"/"latents_rank00_shard000.safetensors"
    before = shard.read_bytes()
    flip(shard)
    run = Run(CONFIG, out)
    with pytest.warns(UserWarning, match="is not what was written.*it is extracted again"):
        run.make_shards(run.tokenizer(), (0, 1))
    assert shard.read_bytes() == before

@pytest.mark.parametrize("name,stage", [("dit.safetensors", "sample"), ("tokenizer.safetensors", "sample")])
def test_a_flipped_bit_in_a_model_is_refused(whole, out, name, stage):
    shutil.copytree(whole/"run", out)
    flip(out/name)
    with pytest.raises(CheckpointError, match=name): run_stages(CONFIG, out, stage)
