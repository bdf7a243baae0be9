# The image of the KubeRay manifests, CPU and GPU alike: PyTorch's wheels bring CUDA, the node brings the driver.
#   docker build -t REGISTRY/prism:0.1.0 . && docker push REGISTRY/prism:0.1.0
FROM python:3.11-slim

# KubeRay's probes and the job submitter call wget; recover.compile wants a compiler; bash is there.
RUN apt-get update && apt-get install -y --no-install-recommends wget g++ && rm -rf /var/lib/apt/lists/*

# Into the system's Python, not a venv: KubeRay starts Ray in a login shell, which forgets PATH.
WORKDIR /opt/prism
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY cluster cluster
COPY stages stages
COPY pipeline pipeline
RUN pip install --no-cache-dir -c constraints.txt '.[cluster]'
COPY examples examples

# The number, not the name: Kubernetes checks runAsNonRoot by it.
RUN useradd --uid 1000 --create-home ray
USER 1000
WORKDIR /home/ray
ENV HOME=/home/ray
