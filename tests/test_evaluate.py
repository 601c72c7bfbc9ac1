"`python -m vavae_nb.evaluate`: each action end to end, complete provenance, what a comparison names, and bad input"
import json, subprocess, sys
from itertools import chain
import numpy as np, pytest, torch
from PIL import Image
from vavae_nb.recipes.config import Config
from vavae_nb.recipes.settings import override, save_config
from vavae_nb.base.files import sha256_file
from vavae_nb.data.images import embedded
from vavae_nb.data.folders import first_of_each
from vavae_nb.evaluate import actions
from vavae_nb.metrics.evaluation import Evaluation
from vavae_nb.metrics.generation import evaluate_generation, how_drawn
from vavae_nb.metrics.reconstruction import evaluate_reconstruction
from vavae_nb.metrics.comparison import compare, provenance_differences
from vavae_nb.tokenizer.shards import extract_shards
from vavae_nb.metrics.distribution import kid, precision_recall
from vavae_nb.metrics.features import extract_features, feature_extractor
from vavae_nb.metrics.quality import FeatureStats, frechet_distance, psnr
from vavae_nb.metrics.reference import load_reference
from vavae_nb.tokenizer.autoencoder import Autoencoder, to_uint8

COMPLETE = {"metric", "value", "standard_error", "n", "n_reference", "extractor", "extractor_sha256", "resize",
            "reference", "settings", "note", "images", "seed", "versions", "device", "seconds"}
DRAWN = {"label_sampling", "sampling", "size"}

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A tokenizer with random weights, its latents, sets of images as .npz"
    d = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    tok = Autoencoder(latent_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                      resolution=32, norm_groups=8)
    tok.save(d/"tokenizer.safetensors")
    test = embedded("test")
    for name,part in dict(samples=slice(0, 120), reference=slice(120, 300), few=slice(0, 3)).items():
        np.savez(d/f"{name}.npz", arr_0=test.pixels[part], labels=test.labels[part])
    extract_shards(tok, test.subset(slice(0, 120)), d/"latents", precision="fp32")
    return d

@pytest.fixture(scope="module")
def alex(): return feature_extractor("alexnet")

@pytest.fixture
def run(capsys):
    "An action in this process: status, what it says, errors"
    def f(action, **kw):
        status = 0
        try: actions[action](**{k: v if isinstance(v, (int, float, list)) else str(v) for k,v in kw.items()})
        except SystemExit as e: status = e.code
        out, err = capsys.readouterr()
        return status, out, err
    return f

def python(*args): return subprocess.run([sys.executable, *map(str, args)], capture_output=True, encoding="utf-8")
def stored(images): return to_uint8(images).permute(0, 3, 1, 2).float()/127.5-1
def figures(path): return {f["metric"]: f for f in json.loads(path.read_text(encoding="utf-8"))["figures"]}
def generation(work, **kw):
    usual = dict(samples=work/"samples.npz", reference=work/"reference.npz", extractor=["alexnet"], device="cpu")
    return usual | kw

def test_help_names_each_action_and_needs_no_torch():
    r = python("-m", "vavae_nb.evaluate", "--help")
    assert r.returncode == 0 and all(a in r.stdout for a in actions)
    code = "import sys, vavae_nb.evaluate; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"

def test_command_line(work, tmp_path):
    options = {"--samples": work/"samples.npz", "--reference": work/"reference.npz", "--extractor": "alexnet",
               "--metrics": "fd", "--batch-size": 50, "--label-sampling": "random", "--out": tmp_path/"e.json"}
    r = python("-m", "vavae_nb.evaluate", "generation", *chain(*options.items()))
    assert r.returncode == 0, r.stderr
    assert figures(tmp_path/"e.json")["fd"]["label_sampling"] == "random (said by the caller)" and "fd" in r.stdout

def test_reconstruction(work, run, alex):
    status, out, err = run("reconstruction", tokenizer=work/"tokenizer.safetensors", n=40, extractor=["alexnet"],
                           lpips="alexnet", errors=3, batch_size=16, device="cpu")
    assert status == 0, err
    f = figures(work/"tokenizer-evaluation-reconstruction.json")
    assert set(f) == {"psnr", "ssim", "lpips", "rfd"}
    for x in f.values(): assert COMPLETE | {"tokenizer", "latent"} <= set(x) and x["n"] == 40
    assert f["rfd"]["extractor"] == alex.key and f["rfd"]["standard_error"] > 0
    assert "weights" in f["lpips"]["extractor"] and len(f["lpips"]["extractor_sha256"]) == 64
    tok, test = Autoencoder.load(work/"tokenizer.safetensors").eval(), embedded("test") # By hand
    x = test.batch(first_of_each(test.labels, 40))
    with torch.no_grad(): y = tok.decode_raw(tok.posterior(x).mode())
    p = psnr(stored(x), stored(y))
    assert f["psnr"]["value"] == pytest.approx(p.mean().item(), rel=1e-4)
    assert f["psnr"]["standard_error"] == pytest.approx(p.std().item()/40**.5, rel=1e-3)
    with torch.no_grad(): a, b = (FeatureStats.of(alex(stored(o))) for o in (x, y))
    assert f["rfd"]["value"] == pytest.approx(frechet_distance(a, b), rel=1e-3)

def test_generation(work, run, alex):
    status, out, err = run("generation", **generation(work, errors=3, infinity=True))
    assert status == 0, err
    e = Evaluation.load(work/"samples-evaluation-generation.json")
    assert [f["metric"] for f in e.figures] == ["fd", "fd_infinity", "kid", "precision", "recall"]
    assert all(COMPLETE | DRAWN <= set(f) for f in e.figures)
    assert {o["metric"] for o in e.omitted} == {"sfid", "inception_score"} and all(o["reason"] for o in e.omitted)
    assert "not measured: sfid" in out
    samples, reference = work/"samples.npz", work/"reference.npz"
    a, b = (extract_features(alex, np.load(o)["arr_0"]) for o in (samples, reference))
    assert e["fd"]["value"] == pytest.approx(frechet_distance(FeatureStats.of(a), FeatureStats.of(b)), rel=1e-6)
    assert e["kid"]["value"] == pytest.approx(kid(a, b, "-", "-", subset_size=120).value, rel=1e-6)
    assert e["kid"]["settings"]["subset_size"] == 120
    assert (e["precision"]["value"], e["recall"]["value"]) == tuple(m.value for m in precision_recall(a, b, "-", "-"))
    assert (e["fd"]["n"], e["fd"]["n_reference"]) == (120, 180) and sha256_file(reference)[:16] in e["fd"]["reference"]
    streamed = evaluate_generation(samples, reference, [alex], metrics=["fd"]) # Statistics only, no rows kept
    assert streamed["fd"]["value"] == pytest.approx(e["fd"]["value"], rel=1e-6)

def test_per_class(work, run, alex):
    e = evaluate_generation(work/"samples.npz", embedded("test"), [alex], metrics=["fd"], per_class=True)
    assert {f["metric"] for f in e.figures} == {"fd", *(f"fd/{c}" for c in embedded("test").classes)}
    status, _, err = run("generation", **generation(work, reference=work/"latents", per_class=True))
    assert status == 2 and "no images under" in err

def test_inception_names_fid_and_finds_stored_statistics(tmp_path):
    test = embedded("test")
    ex, x = feature_extractor("inception"), test.pixels[:16]
    np.savez(tmp_path/"images.npz", arr_0=test.pixels[16:32])
    e = evaluate_generation(x, tmp_path/"images.npz", [ex])
    assert [f["metric"] for f in e.figures] == ["fid", "sfid", "kid", "precision", "recall"]
    assert [o["metric"] for o in e.omitted] == ["inception_score"]
    assert e["fid"]["resize"] == "299 px bilinear-tf1"
    ref = load_reference(tmp_path/"images.npz", ex)
    np.savez(tmp_path/"stats.npz", mu=ref.stats.mean, sigma=ref.stats.cov)
    s = evaluate_generation(x, tmp_path/"stats.npz", [ex])
    assert s["fid"]["value"] == pytest.approx(e["fid"]["value"], rel=1e-6)
    assert "statistics as stored" in s["fid"]["reference"]
    assert {o["metric"] for o in s.omitted} == {"sfid", "kid", "precision_recall", "inception_score"}

def test_latents(work, run):
    status, out, err = run("latents", shards=work/"latents", runs=2)
    assert status == 0, err
    f = figures(work/"latents"/"evaluation-latents.json")
    assert set(f) == {"density_cv", "gini", "normalised_entropy", "knn_distance_cv", "effective_rank", "high_frequency"}
    assert all(COMPLETE <= set(x) for x in f.values())
    gini = f["gini"]
    assert gini["settings"]["protocol"] == "quick variant" and gini["n"] == 120 and gini["standard_error"] > 0
    assert gini["tokenizer"] == Autoencoder.load(work/"tokenizer.safetensors").fingerprint()

def test_how_samples_were_drawn(work, run, tmp_path):
    data = (work/"samples.npz").read_bytes()
    save_config(override(Config(), {"sampling.cfg_scale": 3., "seed": 5}), tmp_path/"config.yaml")
    for name in ("samples.npz", "samples_unguided.npz", "x.npz"): (tmp_path/name).write_bytes(data)
    guided, unguided = how_drawn(tmp_path), how_drawn(tmp_path/"samples_unguided.npz")
    assert (guided["label_sampling"], guided["seed"]) == ("balanced", 5)
    assert (guided["sampling"]["cfg_scale"], unguided["sampling"]["cfg_scale"]) == (3., 1.)
    assert how_drawn(tmp_path/"x.npz")["label_sampling"] == "not said"
    s, npz = tmp_path/"set", dict(sha256=sha256_file(tmp_path/"x.npz"))
    s.mkdir()
    record = dict(settings=dict(classes="random", seed=9, solver="heun"), outputs=dict(npz=npz))
    (s/"sample.json").write_text(json.dumps(record), encoding="utf-8")
    (s/"samples.npz").write_bytes(data)
    assert how_drawn(s) == dict(label_sampling="random", seed=9, sampling=dict(solver="heun"))
    status, _, err = run("generation", **generation(work, samples=s, label_sampling="balanced", metrics=["fd"]))
    assert status == 2 and "are random" in err
    (s/"samples.npz").write_bytes((work/"reference.npz").read_bytes())
    assert "another file" in how_drawn(s)["label_sampling"]

def test_compare_names_what_differs(work, run, alex, tmp_path):
    variants = dict(a={}, resize=dict(resize="bilinear-tf1"), n=dict(samples=work/"reference.npz"),
                    reference=dict(reference="embedded:test"))
    for k,v in variants.items():
        options = generation(work, metrics=["fd", "kid"], errors=3, out=tmp_path/f"{k}.json") | v
        status, _, err = run("generation", **options)
        assert status == 0, err
    status, out, _ = run("compare", a=tmp_path/"a.json", b=tmp_path/"a.json")
    assert status == 0 and "Nothing differs" in out and "+0 ± " in out
    loaded = {k: Evaluation.load(tmp_path/f"{k}.json") for k in variants}
    assert set(provenance_differences(loaded["a"], loaded["resize"])) == {"extractor", "resize"}
    assert {"n", "images"} <= set(provenance_differences(loaded["a"], loaded["n"]))
    assert set(provenance_differences(loaded["a"], loaded["reference"])) == {"reference", "n_reference"}
    _, out, _ = run("compare", a=tmp_path/"a.json", b=tmp_path/"resize.json")
    assert out.count("not subtracted") == 2 and out.index("resize") < out.index("metric  ") and "−" in out
    _, out, _ = run("compare", a=tmp_path/"a.json", b=tmp_path/"reference.json")
    assert "but other reference, n_reference" in out
    tok = Autoencoder.load(work/"tokenizer.safetensors")
    evaluate_reconstruction(tok, embedded("test").subset(slice(0, 5)), lpips="none").save(tmp_path/"r.json")
    assert run("compare", a=tmp_path/"a.json", b=tmp_path/"r.json")[0] == 2

def folder_of(path, images):
    path.mkdir()
    for i,x in enumerate(images): Image.fromarray(x).save(path/f"{i}.png")
    return path

def test_samples_and_references_that_cannot_be_compared(work, run, alex, tmp_path):
    x = embedded("test").pixels[:4]
    np.savez(tmp_path/"floats.npz", arr_0=x.astype(np.float32))
    np.savez(tmp_path/"nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    (tmp_path/"empty").mkdir()
    (tmp_path/"damaged.npz").write_bytes(b"PK not a zip")
    load_reference(work/"reference.npz", alex).save(tmp_path/"alexnet.safetensors")
    grey = folder_of(tmp_path/"grey", [x[0], x[1][..., 0]])
    rgba = folder_of(tmp_path/"rgba", [np.dstack([i, i[..., :1]]) for i in x])
    mixed = folder_of(tmp_path/"mixed", [x[0], x[1][:16]])
    wrong = [
        (dict(samples=work/"few.npz"), "need more than 3 images"),
        (dict(samples=tmp_path/"empty"), "no images under"),
        (dict(samples=grey), "not RGB"),
        (dict(samples=rgba), "not RGB"),
        (dict(samples=mixed), "not 32×32"),
        (dict(samples=tmp_path/"floats.npz"), "float32 images"),
        (dict(samples=tmp_path/"none"), "nothing at"),
        (dict(samples=tmp_path/"damaged.npz"), "not a whole .npz"),
        (dict(reference=tmp_path/"nan.npz"), "2015 Inception"),
        (dict(reference=tmp_path/"alexnet.safetensors", extractor=["vgg16"]), "Use one extractor"),
        (dict(reference=tmp_path/"none.npz"), "nothing at"),
        (dict(reference="embedded:val"), "splits train and test"),
        (dict(extractor=["alxnet"]), "did you mean"),
        (dict(resize="bilnear"), "did you mean"),
        (dict(metrics=["sfid"]), "no spatial features"),
        (dict(extractor=["inception"], weights=tmp_path/"none.pt"), "--extractor efficientnet_lite0")]
    for options,message in wrong:
        status, _, err = run("generation", **generation(work) | options)
        assert status == 2 and "error: " in err and message in err, (options, err)

def test_bad_input_of_the_other_actions(work, run, tmp_path):
    (tmp_path/"x.json").write_text("{", encoding="utf-8")
    tokenizer = work/"tokenizer.safetensors"
    broken = Autoencoder.load(tokenizer)
    torch.nn.init.constant_(broken.decoder_last, float("nan"))
    broken.save(tmp_path/"nan.safetensors")
    wrong = [
        ("reconstruction", dict(tokenizer=tmp_path/"nan.safetensors", extractor=["alexnet"], n=4), "not finite"),
        ("reconstruction", dict(tokenizer=tmp_path/"none"), "no file or folder"),
        ("reconstruction", dict(tokenizer=tokenizer, data=tmp_path/"none", extractor=["alexnet"]), "none"),
        ("latents", dict(shards=tmp_path), "holds no shards"),
        ("latents", dict(shards=work/"latents", n=50), "more than 90"),
        ("compare", dict(a=tmp_path/"x.json", b=tmp_path/"x.json"), "not JSON"),
        ("compare", dict(a=tmp_path/"y.json", b="z"), "no file at")]
    for action,options,message in wrong:
        status, _, err = run(action, **options)
        assert status == 2 and "error: " in err and message in err, (options, err)

def test_a_zero_is_a_setting_and_each_figure_has_its_counterpart():
    def report(*extractors, seed):
        figure = dict(metric="fd", value=1., standard_error=None, n=10, n_reference=0, reference="none")
        return Evaluation("generation", {}, [figure | dict(extractor=e, settings=dict(seed=seed)) for e in extractors])
    differences = provenance_differences(report("alexnet", seed=0), report("alexnet", seed=1))
    assert differences == {"fd: seed": ("0", "1")}
    text = compare(report("vgg16", "alexnet", seed=0), report("alexnet", "inception", seed=0)) # vgg16 and inception
    assert "only in" not in text and text.count("the extractors differ") == 1
