"""README.md from nbs/index.ipynb: its markdown, and its code cells with their text output.

    python tools/readme.py          write README.md
    python tools/readme.py --check  exit 1 if README.md is not what the notebook gives

nbdev's own command for this needs Quarto, which a fresh machine does not have.
"""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def cell_text(cell):
    src = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return re.sub(r"\((?!https?:|#)([\w./-]+\.(?:png|ipynb|html))\)", r"(nbs/\1)", src)
    if re.search(r"^#\|\s*(hide|echo: false|default_exp)", src, re.M): return ""
    out = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell["outputs"]]
    return "\n\n".join([f"```python\n{src}\n```"]+[f"```\n{o.rstrip()}\n```" for o in out if o.strip()])

def readme():
    nb = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))
    parts = [t for c in nb["cells"] if (t := cell_text(c).strip())]
    return "<!-- Made from nbs/index.ipynb by tools/readme.py (make export): edit the notebook -->\n\n" + "\n\n".join(parts) + "\n"

if __name__ == "__main__":
    path, text = ROOT/"README.md", readme()
    if "--check" in sys.argv: sys.exit(0 if path.exists() and path.read_text(encoding="utf-8") == text else "README.md differs from nbs/index.ipynb: run make export")
    path.write_text(text, encoding="utf-8")
