"""The sparse attention of MeloFormer: structure, references and kernels.

The sources live in `kernels/` at the top of a checkout. That folder has no `__init__.py`, so it
can never shadow the unrelated distribution that owns the import name `kernels`; instead this
package looks there for its modules. In an installed wheel they lie beside this file.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "structure.py").is_file():  # a checkout, or an editable install of one
    __path__.append(str(_here.parents[1] / "kernels"))

from .attention import BACKENDS, make_attention, resolve_backend  # noqa: E402
from .structure import Kind, Structure  # noqa: E402

__all__ = ["BACKENDS", "Kind", "Structure", "make_attention", "resolve_backend"]
