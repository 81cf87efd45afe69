#!/bin/sh
# All that only a GPU can tell, in about 9 minutes on an H100:  sh benchmarks/gpu.sh
#
# SDXL's step, as long again:  SIZE=sdxl BATCH=4 PLAN= sh benchmarks/gpu.sh
# Needs  pip install -e '.[cuda13,torch]' pytest  (or cuda12) and PyTorch with CUDA. Anywhere else, to see that it runs:
#   SIZE=mini BATCH=2 DTYPE=float32 ROUNDS=2 STEPS=2 COMPILE= PLAN= sh benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=false # the contenders share the memory

echo "== attention against PyTorch, in bfloat16 and, without TF32, in float32"
JAX_DEFAULT_MATMUL_PRECISION=highest python -m pytest -q -n0 tests/test_attention.py -k "output or float32"

echo "== a training step of ${SIZE:=sd15} against PyTorch (wanted for SD1.5, batch 8, on an H100: 44 ms, 2.5 and 1.2 times)"
timeout 330 python benchmarks/train_step.py --size "$SIZE" --batch_size "${BATCH:-8}" --dtype "${DTYPE:-bfloat16}" \
    --rounds "${ROUNDS:-5}" --steps "${STEPS:-10}" ${COMPILE---torch_compile}

echo "== memory of larger steps, compiled for this device"
for flags in ${PLAN---config=configs/sd15.yaml,--train_batch_size=8 --config=configs/sdxl.yaml,--train_batch_size=4}; do
    timeout 120 python -m ti_jax plan $(echo "$flags" | tr ',' ' ')
done
