# The command line on a CPU: docker build -t factorizer . && docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" \
#   factorizer predict --model hippocampus --input /data/scans --output /data/segmentations
# For a GPU begin both stages from an image with torch, CUDA's driver interface and nvcc, such as
# pytorch/pytorch:*-devel, leave out the line that installs torch, set FACTORIZER_KERNELS_CUDA=1 and
# FACTORIZER_KERNELS_CUDA_ARCHS=all beside FACTORIZER_KERNELS_ISAS, and run with --gpus all --shm-size 2g: loaders pass
# batches through shared memory.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN FACTORIZER_KERNELS_NATIVE=1 FACTORIZER_KERNELS_ISAS=all pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
COPY --from=build /wheels /wheels
# Without this index torch comes with gigabytes of CUDA.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
RUN wheel=$(ls /wheels/factorizer_kernels-*.whl) && pip install --no-cache-dir "${wheel}[seg]" && rm -r /wheels
# A user given by --user has no home, and Matplotlib wants to write there.
ENV HOME=/tmp
ENTRYPOINT ["factorizer"]
CMD ["--help"]
