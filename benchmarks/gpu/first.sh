#!/usr/bin/env bash
# What only a GPU can show, in 330 seconds at most: bash benchmarks/gpu/first.sh, from the repository's root.
# Whole output under $OUT, 60 lines on the screen. It needs torch, triton and pytest, but no package of the extras.
set -u
: "${OUT:=$(mktemp -d)}"
export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1
NAMES="tests/test_triton.py tests/test_triton_*.py tests/test_launch.py tests/test_batch_invariant.py"

python -m pip install --quiet --no-deps --no-build-isolation -e . 2>&1 | tail -n 3
python - <<'PYTHON' 2>&1 | tail -n 3
import torch, triton
import bp_torch.functional as F
x = torch.randn(1000, 100, device="cuda", requires_grad=True)
target = torch.randint(100, (1000,), device="cuda")
loss = F.cross_entropy(F.dropout(F.relu(x), 0.5), target)
loss.backward()
torch.cuda.synchronize()
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "loss", loss.item())
PYTHON

# What runs behind & ignores SIGINT, by which pytest would tell at the end of its time what it has found.
PYTEST='import pytest, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'
run() { # name, seconds, pytest's arguments; without the project's options, which want pytest-timeout
    name=$1 seconds=$2
    shift 2
    timeout --signal=INT --kill-after=20 "$seconds" python -c "$PYTEST" -o addopts= \
        -W ignore::pytest.PytestUnknownMarkWarning -W ignore::pytest.PytestConfigWarning \
        --tb=short -q -rfE -p no:randomly -p no:cacheprovider "$@" >"$OUT/$name.txt" 2>&1
    echo "exit status $?" >>"$OUT/$name.txt"
}
layers() { run layers 155 tests/test_gpu.py tests/test_contracts.py -m "gpu and not slow and not huge" -n 7; }
kernels() { run kernels 155 $NAMES -m "not slow and not huge" -n 7; }
layers & kernels &
wait
run huge 60 tests/test_gpu.py -m huge
timeout 60 python -m benchmarks --device cuda --kind overhead --repeats 30 --out "$OUT/overhead" >"$OUT/overhead.txt" 2>&1
cat "$OUT"/overhead/*.json >"$OUT/overhead.json" 2>/dev/null
rm -rf "$OUT/overhead"

for name in layers kernels huge; do
    echo "== $name: $(grep -E '(passed|failed|error).* in [0-9]' "$OUT/$name.txt" | tail -n 1) $(tail -n 1 "$OUT/$name.txt")"
    grep -E '^(FAILED|ERROR)' "$OUT/$name.txt" | cut -c 1-200 | head -n 12
done
echo "== overhead"
tail -n 12 "$OUT/overhead.txt" | cut -c 1-200
