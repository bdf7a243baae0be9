"""``prism init``: a configuration to start from."""

from __future__ import annotations

from cluster import storage
from cluster.errors import UserError

STARTER = """\
# Distil your own images. First turn them into shards, then check, then run:
#   prism import /path/to/images data/mine       train/ and val/, with a folder per class in each
#   prism plan PRISM_YAML
#   prism run PRISM_YAML
# Relative paths start at the folder in which prism is called.
name: mine
recipe: prism              # prism, prism_published or sre2l
seed: 0
out: runs/mine             # local folder or s3://bucket/prefix

data:
  train: data/mine/train
  val: data/mine/val
  image_size: 32           # distilled images have this side; real ones are resized and cropped to it
  channels: 3              # 1 for grey images

teachers:                  # the first is the primary: it gives the logit loss; all may give the BatchNorm loss
  resnet18: {arch: "builtin:resnet18", kwargs: {width: 16}}
  convnet: {arch: "builtin:convnet_d3", kwargs: {width: 64}}
  mobilenet: {arch: "builtin:mobilenetv2", kwargs: {width_mult: 0.5}}
  # your own: {arch: "user:mymodels.py:make_net", weights: weights/net.safetensors, key_map: {strip_prefix: "module."}}
  # from timm: {arch: "timm:resnet18", weights: pretrained, num_outputs: 1000, class_index: {cat: 281, dog: 207}}

# Trains the teachers that have no weights; the cache keeps them for other runs. With few images, more epochs.
squeeze: {epochs: 10, batch: 64, lr: 0.05, crop_padding: 4, cache: runs/teachers}

recover:
  ipc: 10                  # distilled images per class
  # r_bn: 10.0             # weight of the BatchNorm loss; the recipe has a value for your image_size

relabel: {epochs: 100}     # label epochs = training epochs of the students

evaluate:
  students: {resnet18: {arch: "builtin:resnet18"}}
  seeds: [0, 1, 2]
  protocol: {batch: 10}    # images a step: a distilled set is small
  baselines: [random_real, hard_label]
"""


def write_starter(directory: str, *, dry_run: bool = False) -> str:
    """Write ``DIR/prism.yaml``, or only check that it can be written; an existing one is kept. Returns its path.

    Raises:
        UserError: it exists, or ``directory`` is not writable.
    """
    where = storage.join(directory, "prism.yaml")
    if storage.exists(where):
        raise UserError(f"{where}: exists already; choose another folder or edit it")
    storage.check_writable(directory, "DIR")
    if not dry_run:
        storage.write_bytes(where, STARTER.replace("PRISM_YAML", where).encode())
    return where
