"""README.md from nbs/index.ipynb: its markdown, and its code cells (unless `echo: false`) with their output.

    python tools/readme.py          write README.md
    python tools/readme.py --check  exit 1 if README.md is not what the notebook gives

nbdev's own command for this needs Quarto, which a fresh machine does not have.
"""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def from_root(text): # Links of a page in nbs/, as seen from the top
    text = re.sub(r"\((?!https?:|#|\.\./)([\w./-]+\.(?:png|jpg|ipynb|html))\)", r"(nbs/\1)", text)
    return text.replace("](../", "](")

def cell_text(cell):
    src = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return from_root(src)
    if re.search(r"^#\|\s*(hide|default_exp)", src, re.M): return ""
    shown = [] if re.search(r"^#\|\s*echo: false", src, re.M) else [f"```python\n{src}\n```"]
    for o in cell["outputs"]:
        data = o.get("data", {})
        if "text/markdown" in data: shown.append(from_root("".join(data["text/markdown"])))
        elif text := "".join(o.get("text", data.get("text/plain", ""))).rstrip(): shown.append(f"```\n{text}\n```")
    return "\n\n".join(shown)

def readme():
    nb = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))
    parts = [t for c in nb["cells"] if (t := cell_text(c).strip())]
    return "<!-- Made from nbs/index.ipynb by tools/readme.py (make export): edit the notebook -->\n\n" + "\n\n".join(parts) + "\n"

if __name__ == "__main__":
    path, text = ROOT/"README.md", readme()
    if "--check" in sys.argv: sys.exit(0 if path.exists() and path.read_text(encoding="utf-8") == text else "README.md differs from nbs/index.ipynb: run make export")
    path.write_text(text, encoding="utf-8")
