"Names, paths and messages are shown as they were written: in pictures no mathematics, in tables no markup"
import csv, io, re, warnings
from dataclasses import replace
from itertools import product
import matplotlib.pyplot as plt, mistune, numpy as np, pytest, torch
from bs4 import BeautifulSoup
from PIL import Image
from vavae_nb.base import text as words
from vavae_nb.paper import explorer, figures as fg, rendering, results as ab
from vavae_nb.paper.tables import tables
from vavae_nb.sampling import formats, pictures, sets
from vavae_nb.recipes.paper import recipe
from vavae_nb.training.logs import plot_history

torch.set_num_threads(1)

MARKUP = ["$5_to_$10", "A$^$B", r"x$\y$", r"$\input{x}$", r"$\frac{1}{0}$", "$", "$$", r"a\$b", r"\(x\)",
          r"\begin{a}x\end{a}", "_hidden", "__init__", "*bold*", "`code`", "a|b", r"a\|b", "[link](http://x)",
          "![i](x)", "<b>bold</b>", "<script>alert(1)</script>", "&lt;", "&amp;copy;", "~~gone~~", "H~2~O", "x^2^",
          "50%", "100% of $5", "{x}", "{0}", "#1", "@fig-one", "a -- b", "\\", "\\\\", "' \" `"]
ODD = ["two\nlines", "a\n\n# heading", "tab\there", "\x07\x1b[31mred", "\u2028line",
       "שלום עולם", "مرحبا", "猫と犬", "😀👩‍👩‍👧", "e"+"\u0301"*30,
       "caf\udce9", "\ud800", "\u202eturned", "\x00", " ", "n"*200, "W"*200, "猫"*200]
EVERY = MARKUP+ODD
def ids(name): return re.sub(r"\W", lambda m: f"-{ord(m[0]):x}", name)[:40]
each = pytest.mark.parametrize("name", EVERY, ids=ids)

def as_seen(name): return re.sub(r"\s+", " ", words.one_line(name)).strip() # HTML makes one space of many

@pytest.fixture(autouse=True)
def strict():
    "Whatever warns, fails: a name that the font lacks may warn once, not a hundred times"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        yield
    plt.close("all")

# Text

@each
def test_one_line_is_one_line_that_can_be_written(name):
    s = words.one_line(name)
    assert len(s.splitlines()) <= 1 and s.isprintable() or name.isspace() or "\u200d" in s, repr(s)
    s.encode()
    assert len(words.one_line(name, 32)) <= 32

def test_what_needs_no_care_is_left_alone():
    for name in ("tench, Tinca tinca", "n01440764", "f4d32-lite0-b", "naïve café", "猫", "a (b) c"):
        for f in (words.one_line, words.as_label, words.as_markdown): assert f(name) == name

def test_the_middle_of_a_long_name_is_left_out():
    s = words.one_line("begin"+"x"*200+"end", 21)
    assert len(s) == 21 and s.startswith("begin") and s.endswith("end") and s.count("…") == 1
    assert words.one_line("x"*21, 21) == "x"*21

# Pictures

def drawn(text):
    "Is a text of matplotlib's drawn letter for letter?"
    shown, kind = plt.Text(text=text)._preprocess_math(text)
    return shown if kind is False else None

@each
def test_matplotlib_takes_it_letter_for_letter(name):
    assert drawn(words.as_label(name)).strip() == words.one_line(name, 40).strip()

@pytest.mark.parametrize("some", [EVERY[i::8] for i in range(8)], ids=lambda s: ids(s[0]))
def test_matplotlib_reads_nothing_in_any_place(some):
    fig, ax = plt.subplots(figsize=(2, 2))
    texts = [words.as_label(n) for n in some]
    for t in texts:
        ax.plot([0, 1], label=t)
        ax.text(.5, .5, t)
        ax.annotate(t, (0, 0))
    ax.set_xticks(range(len(texts)), texts)
    ax.set(title=texts[0], xlabel=texts[1], ylabel=texts[2])
    fig.suptitle(texts[3])
    assert [t.get_text() for t in ax.legend().get_texts()] == texts # None has vanished
    with words.quiet_glyphs(): fig.savefig(io.BytesIO())

def images(n): return np.zeros((n, 8, 8, 3), np.uint8)

@pytest.mark.parametrize("name", MARKUP[:8]+ODD, ids=ids)
def test_a_grid_shows_any_name(name, tmp_path):
    pictures.save_grid([images(3), images(2)], [name, "b"], tmp_path/"a.png", f"a title with {name}")
    with Image.open(tmp_path/"a.png") as im: assert im.width < 700 and im.height < 250, im.size
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

def test_a_grid_of_all_of_them(tmp_path):
    pictures.save_grid([images(3)]*len(EVERY), EVERY, tmp_path/"a.png")
    with Image.open(tmp_path/"a.png") as im: assert im.width < 700

def test_wide_letters_are_not_cut_off(tmp_path):
    pictures.save_grid([images(3)]*2, ["W"*30, "i"], tmp_path/"a.png")
    x = np.asarray(Image.open(tmp_path/"a.png").convert("L"))
    assert (x[:, :4] == 255).all() and (x[:, 4:300] < 128).any() # White at the edge, and the letters beside

def test_usual_names_make_the_pictures_they_made(tmp_path):
    pictures.save_grid([images(10)]*2, ["automobile", "nearest\ntraining image"], tmp_path/"a.png", "step 12")
    with Image.open(tmp_path/"a.png") as im: assert im.size == (16+8*len("training image")+10*64+4, 30+2*70)

def test_a_set_of_samples_of_such_classes(tmp_path):
    samples = sets.SampleSet(tmp_path/"s", torch.arange(12).repeat_interleave(2), dict(x=1), EVERY[:12])
    samples.write(0, np.repeat(images(1), 24, 0), dict(seconds=1.))
    formats.finish(samples, ["grid", "folder"])
    assert (tmp_path/"s"/"samples.png").is_file() and len(list((tmp_path/"s"/"images").iterdir())) == 24

def test_curves_of_any_stage_and_term(tmp_path):
    names = [n for n in EVERY if "\0" not in n and n.isprintable()]
    with open(tmp_path/"log.csv", "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(("stage", "step", "seconds", "term", "value"))
        for stage,step in product(names[:3], (1, 2)):
            for term in ("loss", *(f"loss/{n}" for n in names[:12])): rows.writerow((stage, step, 0., term, 1+step))
    with words.quiet_glyphs():
        fig = plot_history(tmp_path/"log.csv")
        fig.savefig(io.BytesIO())
    legend = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert len(legend) == 13 # None has vanished, also not those that begin with _
    assert [drawn(t).strip() for t in legend] == ["loss", *names[:12]]

@pytest.mark.parametrize("name", ["$5_to_$10", "猫"*200], ids=("dollars", "long"))
def test_the_architecture_of_any_recipe(name):
    cfg = recipe("smoke")
    fig = fg.draw_architecture(replace(cfg, recipe=name, foundation=replace(cfg.foundation, name="none")))
    with words.quiet_glyphs(): fig.savefig(io.BytesIO())
    assert drawn(fig.axes[0].get_title()) == words.one_line(name, 80)

def test_a_judge_of_any_name(tmp_path):
    table = tables["fig1"]
    filled = [ab.Filled(r, r.name_at("cpu"), {"LPIPS": {0: .1}, "FD my_$net$": {0: 500.}}, [0]) for r in table.rows]
    fig = fg.plot_dilemma(ab.FilledTable("fig1", "cpu", filled, ["PSNR", "FD my_$net$"], []))
    fig.savefig(io.BytesIO())
    assert any(drawn(ax.get_ylabel()) == "FD over my_$net$" for ax in fig.axes)

def test_the_explorers_pictures(monkeypatch):
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    view = explorer.Density({n: points for n in ("$5_to_$10", "猫\ud800", "n"*200)})
    for name in view.points:
        assert view.at(left=name)
        view.strip(dict(left=name, n=100))
        assert drawn(view.axs[0].get_title()).startswith(words.one_line(name, 30))
    model, tok, about = explorer.small_model()
    model.meta["classes"] = ["$5_to_$10", r"x$\y$", *model.meta["classes"][2:]]
    monkeypatch.setattr(explorer, "small_model", lambda: (model, tok, about))
    view = explorer.Samples()
    view.at(label="$5_to_$10", points=3)
    view.strip(dict(label=r"x$\y$"))

# Tables

def table(name):
    "A table that has a name everywhere that one can come from: a failed row, a row with a failed seed, notes"
    a, b, *_ = tables["fig1"].rows
    filled = [ab.Filled(a, a.name_at("cpu"), {}, [], problem=f"{name}!"),
              ab.Filled(b, b.name_at("cpu"), {"PSNR": {0: 26.}}, [0], problem=f"seed 1 failed: {name}!")]
    return ab.FilledTable("fig1", "cpu", filled, ["PSNR", f"FD {name}!"], [f"data: {name}!, 5 images"])

def shown(soup):
    "Text of an element; a formula that a viewer would find in it is an error"
    for text in soup.find_all(string=True): assert not re.search(r"\$.+\$|\\[(\[]|\\begin\{", text, re.S), text
    return re.sub(r"\s+", " ", soup.get_text()).strip()

def check_page(soup, name):
    seen = as_seen(f"{name}!")
    rows = [[shown(c) for c in tr.find_all(["td", "th"])] for tr in soup.find_all("tr")]
    assert {len(r) for r in rows} == {7} and len(rows) == 4, rows # A header, two rows, ranks; nothing began another
    assert rows[0][:4] == ["row", "seeds", "PSNR", f"FD over {seen}"] and rows[1][2] == seen
    notes = [shown(li) for li in soup.find_all("li")]
    assert len(notes) == 3 and notes[1].endswith(f"seed 1 failed: {seen}") and notes[2] == f"data: {seen}, 5 images"
    allowed = {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "span", "caption"}
    assert {t.name for t in soup.find_all(True)} <= allowed

PLUGINS = ["table", "strikethrough", "math", "url", "superscript", "subscript", "mark", "insert", "footnotes"]
markdown = mistune.create_markdown(escape=False, plugins=PLUGINS)

@each
def test_markdown_shows_any_name(name):
    if "http" in name: return # A bare address becomes a link to itself
    text = rendering.render(table(name))
    assert "$" not in text # Some look for formulas before they read Markdown
    check_page(BeautifulSoup(markdown(text), "html.parser"), name)

def test_markdown_makes_no_link():
    page = BeautifulSoup(markdown(rendering.render(table("[link](http://x)"))), "html.parser")
    for a in page.find_all("a"): assert a.get_text() == a["href"] # Bare addresses only

# A run

@pytest.mark.slow
def test_a_run_on_class_folders_of_such_names(tmp_path):
    from vavae_nb.train import main
    warnings.simplefilter("default")
    names = ["$5_to_$10", "A$^$B", r"x$\y$", "_hidden", "猫", "n"*200, "50% {x}"]
    for k,name in enumerate(names):
        (tmp_path/"data"/name).mkdir(parents=True)
        for i in range(8): Image.fromarray(np.full((32, 32, 3), 20*k+i, np.uint8)).save(tmp_path/"data"/name/f"{i}.png")
    small = {"data.size": 32, "foundation.name": "none", "tokenizer.ch": 8, "tokenizer.latent_dim": 4,
             "tokenizer_training.steps": 2, "tokenizer_training.batch_size": 4, "dit.hidden_size": 32, "dit.depth": 1,
             "dit.num_heads": 2, "dit_training.steps": 2, "dit_training.batch_size": 4, "sampling.n": 14,
             "sampling.points": 3, "evaluation.extractors": "alexnet", "device": "cpu"}
    given = [f"{k}={v}" for k,v in small.items()]
    main(recipe="smoke", data=str(tmp_path/"data"), out=str(tmp_path/"run"), set=[given])
    assert (tmp_path/"run"/"samples.png").is_file() and (tmp_path/"run"/"metrics.json").is_file()
