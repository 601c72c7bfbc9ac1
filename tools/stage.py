"""Stage the site's pages in _proc/ as nbdev does, without Quarto.

    python tools/stage.py

nbdev's own command, where Quarto is missing, tries to install it as root and then installs this package with pip into whichever Python
comes first on the PATH. A test must do neither.
"""
from nbdev import quarto

if __name__ == "__main__":
    quarto._ensure_quarto = lambda: None
    quarto._pre_docs()
