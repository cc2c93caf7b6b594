#!/bin/sh
# Makes build/rivals, the Python environment in which the rivals run; does nothing twice.
#
#   benchmarks/rivals/setup.sh [PYTHON]
#
# PYTHON is one that has kvfold (by default .venv's, or the python3 of the PATH). The environment lies over PYTHON's own
# packages, so that rivals and recipes run on the very same torch and transformers, and PYTHON itself stays as it is.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
environment=$root/build/rivals
base=${1:-$root/.venv/bin/python}
[ $# -gt 0 ] || [ -x "$base" ] || base=python3

if ! "$base" -c 'import kvfold, torch, transformers' 2>/dev/null; then
    echo "setup.sh: $base has no kvfold" >&2
    echo "hint: pip install -c constraints.txt -e '.[dev]' there, or name another: setup.sh PYTHON" >&2
    exit 2
fi
if ! command -v c++ >/dev/null 2>&1; then
    echo "setup.sh: there is no c++; quanto needs a C++ compiler" >&2
    echo "hint: install g++ or clang" >&2
    exit 2
fi

python=$environment/bin/python
[ -x "$python" ] || "$base" -m venv "$environment"
# PYTHON's packages behind the environment's own, with what their .pth files say.
"$base" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'END'
import sys
import sysconfig
from pathlib import Path

folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
line = f"import site; list(map(site.addsitedir, {list(folders)!r}))\n"
Path(sys.argv[1], "kvfold_base.pth").write_text(line, encoding="utf-8")
END
"$python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt"
"$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -r "$here/requirements-kvpress.txt"

# Everything is imported once, and quanto's extension compiled (about a minute, the first time).
cd "$root"
PATH=$environment/bin:$PATH "$python" - <<'END'
import hqq.core.quantize
import kvpress
import torch
from optimum.quanto import MaxOptimizer, qint4, quantize_weight

numbers = torch.randn(64, 64)
scale, shift = MaxOptimizer()(numbers, qint4, 0, 64)
packed = quantize_weight(numbers, qint4, 0, scale, shift, 64)
assert (packed.dequantize() - numbers).abs().mean() < 0.3
END
echo "ready: build/rivals/bin/python -m benchmarks.rivals --help"
