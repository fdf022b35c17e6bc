#!/usr/bin/env bash
# Writes the locked sets of both images: what setup.cfg asks for, in the versions that the tests run with
# (those of .venv), each file with its hashes. Needs uv: pip install uv.
#
#     docker/lock.sh [--check]     --check: change nothing, fail where a set is out of step
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
python=${PYTHON:-.venv/bin/python}
out=docker/locks
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
# A package that the tests do not have keeps its locked version, here as in the folder itself.
[ "${1:-}" = --check ] && cp docker/locks/*.txt "$aside" && out=$aside

tested=$aside/tested.in
# Not the opponents and oracles of the tests: their own requirements are years old. Nor filelock, which
# one of them holds back: the newest.
"$python" -m pip freeze --exclude-editable | grep '==' | grep -Eiv '^(open.flamingo|lmms|filelock)' > "$tested"

locked() {  # name, then extras of setup.cfg
    local name=$1 extras=()
    shift
    for extra in "$@"; do extras+=(--extra "$extra"); done
    "$uv" pip compile setup.cfg "$aside/$name.in" "${extras[@]}" \
        --constraint "$tested" --override docker/locks/overrides.txt --upgrade-package filelock \
        --generate-hashes --no-header --no-annotate \
        --python-version 3.12 --python-platform x86_64-manylinux_2_28 --quiet --output-file "$out/$name.txt"
}

# DeepSpeed asks for it where it is built for GPUs, and its metadata on this machine do not say so.
echo nvidia-ml-py > "$aside/cuda.in"
: > "$aside/cpu.in"
locked cuda train wandb eval milvus adapters remote tables
locked cpu eval demo
echo "setuptools==$("$python" -c 'import setuptools; print(setuptools.__version__)')" |
    "$uv" pip compile - --generate-hashes --no-header --no-annotate --python-version 3.12 --quiet \
        --output-file "$out/build.txt"
# The CPU image takes torch and torchvision from PyTorch's own index: the files of PyPI need CUDA.
# DeepSpeed stands alone: it is compiled against the torch that is installed before it.
"$python" - "$out" <<'PYTHON'
import re, sys
from pathlib import Path

out = Path(sys.argv[1])
CUDA = re.compile(r"(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)(==|\[)")
blocks = {name: re.split(r"(?m)^(?=\S)", (out / f"{name}.txt").read_text()) for name in ("cpu", "cuda")}
alone = [block for block in blocks["cuda"] if block.startswith("deepspeed==")]
(out / "cpu.txt").write_text("".join(block for block in blocks["cpu"] if not CUDA.match(block)))
(out / "cuda.txt").write_text("".join(block for block in blocks["cuda"] if block not in alone))
(out / "deepspeed.txt").write_text("".join(alone))
PYTHON

if [ "${1:-}" = --check ]; then
    for name in cuda deepspeed cpu build; do diff -q "$out/$name.txt" "docker/locks/$name.txt"; done
fi
