#!/usr/bin/env bash
# How fast the kernels are, in 420 seconds at most: bash benchmarks/gpu/second.sh, from the repository's root, after first.sh.
# Whole output under $OUT, 60 lines on the screen.
set -u
: "${OUT:=$(mktemp -d)}"
export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1

python -m pip install --quiet --no-deps --no-build-isolation -e . 2>&1 | tail -n 3
timeout 150 python -m benchmarks --device cuda --kind layer --provider bp_torch --provider torch \
    --repeats 30 --seconds 1 --limit 120 --out "$OUT/layers" >"$OUT/layers.txt" 2>&1
cat "$OUT"/layers/*.json >"$OUT/layers.json" 2>/dev/null
rm -rf "$OUT/layers"
timeout 110 python -m benchmarks.gpu.tune >"$OUT/tune.txt" 2>&1
timeout 70 python -m benchmarks.gpu.gemm >"$OUT/gemm.txt" 2>&1
# Beside torch.compile, the rows that decide. No max-autotune, which compiles for a minute or two a row.
timeout 80 python -m benchmarks --device cuda --kind layer --provider bp_torch --provider compile --provider torch \
    --only "dense" --only "batch norm" --only "cross-entropy" --repeats 20 --seconds 1 --limit 60 \
    --out "$OUT/compile" >"$OUT/compile.txt" 2>&1
rm -rf "$OUT/compile"

echo "== layers: $(grep -c 'x torch' "$OUT/layers.txt") rows"
grep -E 'wrong|failed|Error' "$OUT/layers.txt" | cut -c 1-160 | head -n 6
grep bp_torch "$OUT/layers.txt" | cut -c 1-160 | head -n 24
echo "== tune: the fastest block of each, where it is not the first of its table"
grep -E '^copy|FAILED|other than' "$OUT/tune.txt" | cut -c 1-160 | head -n 14
echo "== gemm"
grep -E 'cuBLAS|fastest|failed' "$OUT/gemm.txt" | cut -c 1-160 | head -n 10
