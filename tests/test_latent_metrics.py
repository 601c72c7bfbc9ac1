"Cheap numbers of a latent space, and the dashboard that logs them: what the notebooks' cells cannot guard"
import json
import numpy as np, pytest, torch
from sklearn.linear_model import RidgeClassifier
from vavae_nb.recipes.settings import override
from vavae_nb.base.errors import DataError, ShapeError
from vavae_nb.data.images import Images, to_batch
from vavae_nb.data.folders import held_out
from vavae_nb.metrics.latents import (channel_normalised, effective_rank, high_frequency_share, knn_probe,
                                      latent_report, linear_cka, linear_probe, mutual_knn, radial_spectrum)
from vavae_nb.recipes.paper import recipe
from vavae_nb.base.tensors import generator, test_tensor
from vavae_nb.training.dashboard import LatentDashboard, plot_dashboard, probe_images
from vavae_nb.training.logs import read_log
from vavae_nb.training.stages import run_stages

def randn(*size, what="x"): return torch.randn(*size, generator=generator(0, what))

def test_what_scale_and_rotation_change():
    z, y = randn(120, 4, 4, 4).double(), torch.arange(120) % 3 # In float32, 5 + 1e-3 z would be rounded
    scale,offset = (torch.tensor(v).view(1, -1, 1, 1) for v in ([1e-3, 1., 50., 1e3], [5., 0., -1., 9.]))
    scaled = z*scale+offset
    a, b = latent_report(z, y, z[:, :2]), latent_report(scaled, y, z[:, :2])
    assert all(a[k] == pytest.approx(b[k], abs=2e-3) for k in a), "a channel's mean and scale must not count"
    turn = torch.linalg.qr(randn(4, 4, what="turn"))[0].double()
    assert effective_rank(torch.einsum("ij,bjhw->bihw", turn, z.double())) == pytest.approx(effective_rank(z))
    assert effective_rank(z.half()) == pytest.approx(effective_rank(z), abs=1e-2)
    assert effective_rank(torch.cat([z, 0*z], 1)) == pytest.approx(effective_rank(z)) # Dead channels have no share

@pytest.mark.parametrize("h,w", [(4, 4), (8, 8), (5, 7), (1, 1)])
def test_spectrum_keeps_all_power(h, w):
    z = randn(10, 3, h, w)
    f, power = radial_spectrum(z)
    test_tensor(power.sum(1), z.double().square().mean((0, 2, 3)), rtol=1e-9)
    share = high_frequency_share(z)
    assert f[0] == 0 and ((0 <= share) & (share <= 1)).all() and high_frequency_share(0*z).eq(0).all()

def test_spectrum_is_of_positions_not_of_images():
    z = randn(50, 2, 1, 1).expand(50, 2, 8, 8) # Images differ, positions do not
    assert high_frequency_share(z).max() < 1e-12
    board = (-1.)**torch.arange(8)
    assert high_frequency_share((board[:, None]*board).expand(1, 1, 8, 8)).item() == pytest.approx(1)

@pytest.mark.parametrize("d", [1, 20]) # 16 and 320 numbers of 135 training images: primal and dual
@pytest.mark.parametrize("lam", [.01, 1.])
def test_linear_probe_is_that_of_scikit_learn(d, lam):
    y = torch.arange(180) % 3
    z = randn(180, d, 4, 4)+.3*randn(3, d, 4, 4, what="centres")[y]
    x, test = z.flatten(1).double().numpy(), held_out(y.numpy(), 4)
    a, b = ((o-x[~test].mean(0))/x[~test].std(0, ddof=1) for o in (x[~test], x[test]))
    theirs = RidgeClassifier(alpha=lam*len(a)).fit(a, y[~test]).score(b, y[test])
    assert linear_probe(z, y, lam) == pytest.approx(theirs)
    assert linear_probe(z, y, lam) > .4

def test_probes_see_no_held_out_label():
    "Noise says nothing of its class; a classifier that had met the held-out images would know each of them by heart"
    y, z = torch.arange(400) % 2, randn(400, 8, 8, 8)
    for accuracy in (knn_probe(z, y, k=1), linear_probe(z, y, lam=1e-3)):
        assert accuracy < .7 # 100 images: chance is 0.5, give or take 0.05
    told = torch.cat([z, 20*y.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)], 1)
    assert knn_probe(told, y) > .9 and linear_probe(told, y) == 1

def test_alignment_floor_and_ceiling():
    a, b = randn(500, 5, what="a"), randn(500, 30, what="b")
    assert linear_cka(a, b) == pytest.approx((5*30)**.5/500, rel=.5)
    assert mutual_knn(a, b) == pytest.approx(10/499, abs=.015)
    assert linear_cka(a, a+7) == pytest.approx(1) and mutual_knn(a, 3*a+1) == 1
    assert linear_cka(a, b) == pytest.approx(linear_cka(b, a))

def test_what_cannot_be_measured_is_refused():
    z,y = randn(40, 2, 4, 4),torch.arange(40) % 2
    x = z.flatten(1)
    with pytest.raises(ShapeError): latent_report(z[:, :, 0], y)
    with pytest.raises(DataError): latent_report(z*float("inf"), y)
    with pytest.raises(ShapeError): linear_probe(z, y.float())
    with pytest.raises(DataError): knn_probe(z, torch.arange(len(z)))
    with pytest.raises(DataError): linear_cka(x, 0*x)
    with pytest.raises(DataError): mutual_knn(x, x*float("nan"))
    with pytest.raises(ShapeError): mutual_knn(x[:10], x[:10])

def test_a_dead_channel_and_a_dead_latent():
    z, y = randn(60, 3, 4, 4), torch.arange(60) % 2
    z[:, 1] = 4.
    assert channel_normalised(z)[:, 1].eq(0).all() and np.isfinite(list(latent_report(z, y).values())).all()
    with pytest.raises(DataError): latent_report(0*z+3, y)

def test_probe_images_of_many_classes():
    y = np.repeat(np.arange(100), 5)
    def painted(labels): return np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 4, 4, 3)) # With its class
    images = Images(painted(y), y, [str(i) for i in range(100)], "many")
    few = probe_images(images, n=60, classes=15)
    assert len(few) == 60 and set(np.bincount(few.labels)[np.unique(few.labels)]) == {4}
    assert torch.equal(few.batch(slice(None)), to_batch(painted(few.labels)))
    assert few.fingerprint == probe_images(images, n=60, classes=15).fingerprint

def test_the_dashboard_of_a_run_with_phases(tmp_path):
    "One history over all phases, in the run's log; the tokenizer is that of a run without it"
    cfg = override(recipe("smoke"), {
        "device": "cpu", "foundation.name": "none", "tokenizer.ch": 8, "tokenizer.latent_dim": 4, "data.limit": 60,
        "tokenizer_training.disc_weight": 0., "tokenizer_training.lpips_weight": 0.,
        "tokenizer_training.steps": 3, "tokenizer_training.phases": "{steps: 2}"})
    plain = run_stages(cfg, tmp_path/"plain", "tokenizer")
    watched = run_stages(override(cfg, {"evaluation.dashboard_every": 2}), tmp_path/"watched", "tokenizer")
    assert plain.tokenizer().fingerprint() == watched.tokenizer().fingerprint()
    log = read_log(watched.out/"log.csv")["dashboard"]
    assert [s for s,_ in log["psnr"]] == [0, 2, 3, 5] and "cka" not in log and "high_frequency/3" in log
    assert "dashboard" not in read_log(plain.out/"log.csv")
    assert (watched.out/"dashboard.png").stat().st_size > 10_000 and not (plain.out/"dashboard.png").exists()
    assert json.loads((watched.out/"state.json").read_text(encoding="utf-8"))["tokenizer"]["dashboard_seconds"] > 0
    again = run_stages(override(cfg, {"evaluation.dashboard_every": 2}), tmp_path/"watched", "tokenizer", force=True)
    assert len(read_log(again.out/"log.csv")["dashboard"]["psnr"]) == 4 # Not 8: rows of the first try are gone
