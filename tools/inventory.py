"""The list of ablation results in results/README.md, from the files that are there.

    python tools/inventory.py
"""
import re
from pathlib import Path
from vavae_nb.ablations import inventory

ROOT = Path(__file__).resolve().parent.parent

def listed(text): # The same text with the list renewed
    return re.sub(r"(<!-- inventory -->\n).*?(<!-- /inventory -->)", lambda m: m[1]+inventory("cpu", ROOT/"results")+"\n"+m[2], text, flags=re.S)

if __name__ == "__main__":
    path = ROOT/"results"/"README.md"
    path.write_text(listed(path.read_text()))
