"""What follows from the ablations' results: the list of them in results/README.md, and the picture of the front page.

    python tools/inventory.py
"""
import re
from pathlib import Path
from vavae_nb.paper.results import inventory, load_table
from vavae_nb.paper.figures import picture, plot_frontier

ROOT = Path(__file__).resolve().parent.parent

def listed(text): # The same text with the list renewed
    return re.sub(r"(<!-- inventory -->\n).*?(<!-- /inventory -->)", lambda m: m[1]+inventory("cpu", ROOT/"results")+"\n"+m[2], text, flags=re.S)

if __name__ == "__main__":
    path = ROOT/"results"/"README.md"
    path.write_text(listed(path.read_text()))
    (ROOT/"nbs"/"images"/"frontier.png").write_bytes(picture(plot_frontier(load_table("fig2", "cpu", ROOT/"results"))).data)
