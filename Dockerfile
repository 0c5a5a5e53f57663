# pmet with Ray's job server and S3, for CPUs or for NVIDIA GPUs; not root.
#
#   docker build --tag registry.example.com/pmet:1 .
#   docker build --tag registry.example.com/pmet:1-cuda --build-arg TORCH=cu128 .
#   docker run --rm --volume "$PWD":/work registry.example.com/pmet:1 run job.yaml
#
# TORCH is the name of a wheel index of PyTorch: cpu, cu126, cu128, … The CUDA wheels bring CUDA's
# libraries; the host needs NVIDIA's driver and container runtime. RAY must be the Ray version of the
# cluster (rayVersion in examples/rayjob.yaml). All versions are within the bounds of pyproject.toml.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH=cpu
ARG RAY=2.60.0
ARG EXTRAS=cluster,s3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
RUN python -m venv /opt/pmet
ENV PATH=/opt/pmet/bin:$PATH
WORKDIR /build
# First what rarely changes: a change of the code repeats only the last step.
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(next(d for d in project['dependencies'] if d.startswith('torch>')))" > torch.txt \
    && pip install --index-url "https://download.pytorch.org/whl/${TORCH}" --requirement torch.txt
COPY README.md LICENSE ./
COPY pmet pmet
COPY pipeline pipeline
COPY jobs jobs
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]" "ray==${RAY}"

FROM python:${PYTHON}-slim
# KubeRay starts Ray with bash, and asks with wget whether it is well.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home pmet
COPY --from=build /opt/pmet /opt/pmet
ENV PATH=/opt/pmet/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["pmet"]
CMD ["--help"]
