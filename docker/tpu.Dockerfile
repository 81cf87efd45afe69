# ti_jax for TPU VMs. Run it on each host of a slice with the host's devices and network:
#
#   docker build -f docker/tpu.Dockerfile -t ti-jax:tpu .
#   docker run --rm --privileged --net=host ti-jax:tpu train --train_data_dir gs://BUCKET/cat --output_dir gs://BUCKET/run ...
FROM python:3.13-slim

COPY . /src
RUN pip install --no-cache-dir "/src[tpu,gcs,heif,datasets]" && rm -rf /src

# A spot VM loses its disk: JAX_COMPILATION_CACHE_DIR=gs://BUCKET/xla keeps compiled programs.
ENV TI_JAX_CACHE=/cache HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["ti-jax"]
CMD ["--help"]
