"The explorer's widgets: values set on the controls, what comes of it; and the small model that ships with the package"
import io, json, math
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
import vavae_nb
from vavae_nb.paper import explorer
from vavae_nb.base.errors import ConfigError
from vavae_nb.base.files import sha256_file
from vavae_nb.paper.explorer import Channels, Density, Samples, Times, Trajectories, VFSurface
from vavae_nb.paper.explorer import mixture_velocity, small_model, toy_velocity
from vavae_nb.flow.sampler import Guided, integrate, time_grid
from vavae_nb.base.tensors import generator, test_tensor

torch.set_num_threads(1)

def picture(view): return np.asarray(Image.open(io.BytesIO(view.picture.value)))

def test_a_moved_slider_changes_numbers_and_picture():
    view = VFSurface()
    assert view.picture.value == b""                                      # Nothing is drawn that nobody sees
    box = view.widget()
    before, free = picture(view), view.numbers["both_free"]
    view.controls["distmat_margin"].value = 1.
    assert view.numbers["both_free"] > free and (picture(view) != before).any()
    view.controls["distmat_margin"].value = .25
    assert view.numbers["both_free"] == free and (picture(view) == before).all()
    assert list(box.children[0].children) == list(view.controls.values()) and box.children[1] is view.picture

def test_margins_end_each_term_where_they_should():
    view = VFSurface()
    for m1,angle in ((0., 0.), (.5, 60.), (1., 90.), (2., 180.)): # 91 angles, two degrees apart
        view.at(cos_margin=m1)
        loss = view.loss.get_ydata()
        inside = view.angles.numpy() <= angle+1e-3
        assert (loss[inside] < 1e-6).all() and (loss[~inside] > 0).all()
        assert math.isclose(view.numbers["edge"], angle, abs_tol=1e-5)
        sines = np.sin(np.deg2rad(view.angles.numpy()[~inside]))
        assert np.allclose(view.pull.get_ydata()[~inside], sines, atol=1e-5) # Not softened
    view.at(cos_margin=2., distmat_margin=2.)
    assert view.numbers["cos_free"] == view.numbers["distmat_free"] == view.numbers["both_free"] == 1.
    assert view.at(cos_margin=0., distmat_margin=0.)["both_free"] < .01

def test_times_follow_their_controls():
    view = Times()
    training, _, marks = view.over_t
    def grid(): return marks.get_xdata()
    view.at(shift=1., points=11)
    assert np.allclose(grid(), np.linspace(0, 1, 11), atol=1e-6)          # No shift: even times
    view.at(shift=.3)
    test_tensor(torch.as_tensor(grid()), time_grid(11, .3))
    for mean,std in ((0., 1.), (-1.2, 1.7)):
        view.at(mean=mean, std=std)
        x, p = view.t.logit(), torch.as_tensor(training.get_ydata())
        normal = torch.distributions.Normal(mean, std)
        mass = torch.trapezoid(p, view.t)
        test_tensor(mass, normal.cdf(x[-1])-normal.cdf(x[0]), rtol=1e-3)  # Between the first time and the last
    assert view.numbers["overlap"] > .95

def test_mixture_velocity_is_the_marginal_one():
    double = dict(dtype=torch.float64)
    means, std, w = torch.tensor([[-1.], [1.2]], **double), .3, torch.tensor([.7, .3], **double)
    def normal(x, m, s): return torch.exp(-.5*((x-m)/s)**2)
    x1 = torch.linspace(-6, 6, 4001, **double)
    for x,t in ((.2, .6), (-.9, .1), (1.5, .9)):
        x0 = (x-t*x1)/(1-t)                                               # The only noise that leads from x1 to x at t
        p = (w*normal(x1[:, None], means[:, 0], std)).sum(1)*normal(x0, 0., 1.)
        v = mixture_velocity(torch.tensor([[x]], **double), t, means, std, w)[0, 0]
        test_tensor(v, (p*(x1-x0)).sum()/p.sum(), rtol=1e-6)

def test_guidance_of_scale_1_is_the_conditional_trajectory():
    view = Trajectories()
    y = view.labels
    def conditional(x, t): return toy_velocity(x, torch.full((len(x),), t), y)
    for solver in ("euler", "heun"):
        view.at(cfg_scale=1., solver=solver, points=12)
        alone = integrate(conditional, view.x0, time_grid(12, 1.), solver)
        test_tensor(view.x1, alone)
    test_tensor(torch.as_tensor(view.paths.get_segments()[3][-1]), view.x1[3])     # What is drawn ends where it should
    half = Guided(toy_velocity, y, 2, 4., (.5, 1.))
    test_tensor(half(view.x0, .4), Guided(toy_velocity, y, 2, 1.)(view.x0, .4))
    plain = view.x1
    assert view.at(cfg_scale=4.)["evaluations"] == 44                     # Heun: twice 11 steps, each with two halves
    assert (view.x1-plain).abs().max() > .1
    off = view.at(cfg_scale=4., cfg_interval=(0., 0.))                    # Off but for the first of them
    assert off["evaluations"] == 23

def test_the_shipped_model_is_whole_and_says_how_it_was_made():
    model, tok, about = small_model()
    folder = Path(vavae_nb.__file__).parent/"embedded"
    for name,f in about["files"].items():
        assert (folder/name).stat().st_size == f["bytes"] < 4e6 and sha256_file(folder/name) == f["sha256"]
    assert about["command"][0].startswith("python -m vavae_nb.ablations table2 --scale cpu")
    provenance, config = about["provenance"], about["config"]
    assert len(provenance["commit"]) == 40 and provenance["data"]["train"]["fingerprint"]
    assert about["measured_before_rounding"]["reconstruction"]["psnr"] > 20
    assert config["tokenizer.latent_dim"] == tok.latent_dim == model.in_channels and about["seed"] == config["seed"]
    assert not model.training and not tok.training and next(model.parameters()).dtype == torch.float32

def test_samples_depend_on_noise_class_and_guidance():
    view = Samples()
    view.at(points=3, cfg_scale=1.)
    plain = view.plain
    assert plain.shape == (view.n, 32, 32, 3) and plain.dtype == np.uint8 and plain.std() > 5
    assert view.guided is plain and view.numbers["moved"] == 0.
    assert view.at(cfg_scale=5., cfg_interval=(0., 1.))["moved"] > 0. and view.plain is plain # Not drawn again
    view.at(cfg_scale=1., seed=1)
    assert (view.plain != plain).any()
    view.at(seed=0, label=view.classes[0])
    assert (view.plain != plain).any()

def test_an_edited_channel_is_restored_exactly():
    view = Channels()
    plain = view.plain.clone()
    assert view.at(channel=3, scale=0.)["moved"] > 0. and (view.edited != plain).any()
    zero = view.latent.get_array().copy()
    assert view.at(scale=1.)["moved"] == 0. and torch.equal(view.edited, plain)
    i, j = view.corner(3)
    assert (zero[i:i+8, j:j+8] == 0).all() and (view.latent.get_array()[i:i+8, j:j+8] != 0).any()
    assert view.at(shift=1.)["moved"] > 0. and view.at(shift=0.)["moved"] == 0.
    view.at(image=8)
    assert (view.plain != plain).any()

def test_density_shows_the_points_it_was_asked_for():
    gen = generator(0, "dots")
    even = torch.cartesian_prod(torch.linspace(-1, 1, 20), torch.linspace(-1, 1, 20))
    lumpy = torch.cat([.05*torch.randn(300, 2, generator=gen), torch.randn(100, 2, generator=gen)])
    view = Density({"even": even, "lumpy": lumpy})
    assert view.numbers["left_cv"] < .3 < view.numbers["right_cv"]
    assert view.numbers["left_entropy"] > view.numbers["right_entropy"]
    same = view.at(right="even")
    assert same["right_cv"] == same["left_cv"]
    view.at(n=200)
    assert [len(d.get_offsets()) for d in view.dots] == [200, 200]

def test_a_value_out_of_reach_is_refused_and_moves_nothing():
    view = Times()
    before = view.values
    for wrong,error in ((dict(shft=1.), "did you mean 'shift'"),
                        (dict(shift=1., points=1000), "points 1000 is out of reach: it goes from 5 to 250"),
                        (dict(shift=.001), "out of reach")):
        with pytest.raises(ConfigError, match=error): view.at(**wrong)
    assert view.values == before
    with pytest.raises(ConfigError, match="did you mean 'heun'"): Trajectories().at(solver="huen")

def test_a_strip_leaves_the_controls_alone():
    view = Times()
    before, h = view.values, round(view.size[1]*75)
    im = view.strip(dict(shift=.3), dict(shift=1.5, mean=1.))
    assert view.values == before and im.height in (2*h, 2*h-1, 2*h+1, 2*h-2)
    rows = np.asarray(im.convert("L"))
    assert (rows[:im.height//2] != rows[im.height//2:]).any()
