# ti_jax for NVIDIA GPUs. The CUDA libraries come as Python packages, so that the host needs its driver alone, and Docker
# the NVIDIA Container Toolkit.
#
#   docker build -f docker/gpu.Dockerfile -t ti-jax:gpu .
#   docker run --rm --gpus all -v "$PWD/output:/work/output" -v "$HOME/.cache/ti_jax:/cache" ti-jax:gpu train
FROM python:3.13-slim

COPY . /src
# cuda13 needs a driver from 580 on; for an older one: --build-arg CUDA=cuda12
ARG CUDA=cuda13
RUN pip install --no-cache-dir "/src[$CUDA,gcs,heif,datasets]" && rm -rf /src

# Compiled programs and encoded pictures, to be kept between runs with a volume.
ENV TI_JAX_CACHE=/cache HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["ti-jax"]
CMD ["--help"]
