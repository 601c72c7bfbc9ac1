"""What follows from the ablations' results: the list of them in results/README.md, and the picture of the front page.

    python tools/inventory.py
"""
import re
from pathlib import Path
from vavae_nb.paper.results import inventory, load_table
from vavae_nb.paper.figures import as_image, plot_frontier

ROOT = Path(__file__).resolve().parent.parent

def listed(text):
    "The same text with the list renewed"
    before, _, rest = text.partition("<!-- inventory -->\n")
    _, _, after = rest.partition("<!-- /inventory -->")
    return f"{before}<!-- inventory -->\n{inventory('cpu', ROOT/'results')}\n<!-- /inventory -->{after}"

if __name__ == "__main__":
    path = ROOT/"results"/"README.md"
    path.write_text(listed(path.read_text(encoding="utf-8")), encoding="utf-8")
    fig = plot_frontier(load_table("fig2", "cpu", ROOT/"results"))
    (ROOT/"nbs"/"images"/"frontier.png").write_bytes(as_image(fig).data)
