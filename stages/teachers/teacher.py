"""A frozen network that speaks the run's language: the data's images in, logits of the data's classes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UserError
from stages.data import DataSpec
from stages.teachers.build import bn_layers, build_network, memory_format
from stages.teachers.card import TeacherCard, card_beside
from stages.teachers.options import PRETRAINED, TeacherSpec
from stages.teachers.pretrained import Pretrained, load_pretrained
from stages.teachers.weights import apply_weights, load_state


class Teacher(nn.Module):
    """A network in evaluation mode for good, without gradients of its own weights.

    Args:
        name: for messages.
        network: takes its own normalisation and size, returns logits [B, num_outputs].
        data: the space of the images.
        num_outputs: outputs of the network.
        outputs: output of each data class, in the data's order; None: they are the same.
        class_names: of the network in output order, where known.
        mean, std: normalisation of the network.
        input_size: side the network takes.
        resize: side before the centre of ``input_size`` is cut out.
    """

    matrix: Tensor
    scale: Tensor
    shift: Tensor
    index: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        data: DataSpec,
        *,
        num_outputs: int,
        outputs: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
        resize: int | None = None,
    ):
        super().__init__()
        self.name, self.data, self.network = name, data, network
        self.num_outputs = num_outputs
        self.class_names = None if class_names is None else list(class_names)
        self.mean, self.std = list(mean or data.mean), list(std or data.std)
        self.input_size = input_size or data.image_size
        self.resize = resize or self.input_size
        self.outputs = list(range(num_outputs)) if outputs is None else list(outputs)
        own, run = torch.tensor([self.mean, self.std]), torch.tensor([data.mean, data.std])
        # ((x · σ + μ) − μ') / σ' = x · σ/σ' + (μ − μ')/σ'
        self.register_buffer("scale", (run[1] / own[1]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((run[0] - own[0]) / own[1]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("matrix", resize_matrix(data.image_size, self.resize, self.input_size), persistent=False)
        self.register_buffer("index", torch.tensor(self.outputs), persistent=False)
        self._same_space = self.mean == list(data.mean) and self.std == list(data.std)
        self._same_size = self.input_size == self.resize == data.image_size
        self._same_classes = self.outputs == list(range(num_outputs))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever is asked: a teacher's statistics must not move."""
        return super().train(False)

    @property
    def space(self) -> list[object]:
        """What tells its way from the data's images to logits of the data's classes from another's, as plain values."""
        return [self.input_size, self.resize, self._same_size, self._same_space, self._same_classes, len(self.outputs)]

    @property
    def bn_layers(self) -> list[nn.BatchNorm2d]:
        """BatchNorm2d layers of the network in ``modules()`` order."""
        return bn_layers(self.network)

    def prepare(self, x: Tensor) -> Tensor:
        """The network's own input for data-normalised images.

        Args:
            x: float32 [B, C, S, S].

        Returns:
            float32 [B, C, input_size, input_size]; ``x`` itself where nothing differs. Differentiable; resizing
            is bilinear, antialiased when it shrinks.
        """
        if not self._same_size:
            # As two products with fixed matrices, because their gradient sums in a fixed order on every device; in
            # float32 whatever the network computes in.
            with torch.autocast(x.device.type, enabled=False):
                x = self.matrix @ x @ self.matrix.T
        return x if self._same_space else x * self.scale + self.shift

    def forward_full(self, x: Tensor) -> Tensor:
        """All logits of the network, [B, num_outputs]."""
        return self.network(self.prepare(x))

    def select(self, logits: Tensor) -> Tensor:
        """[B, num_outputs] → [B, data classes] in the data's order."""
        return logits if self._same_classes else logits[:, self.index]

    def forward(self, x: Tensor) -> Tensor:
        """Data-normalised float32 [B, C, S, S] → logits [B, data classes]."""
        return self.select(self.forward_full(x))


def resize_matrix(size: int, resize: int, crop: int) -> Tensor:
    """One-dimensional bilinear resizing ``size`` → ``resize``, then the centre ``crop``, float32 [crop, size].

    Antialiased when it shrinks; an image is resized by ``m @ image @ m.T``.
    """
    eye = torch.eye(size, dtype=torch.float64)[None, None]
    full = F.interpolate(eye, size=(resize, size), mode="bilinear", antialias=resize < size)[0, 0]
    top = (resize - crop) // 2
    return full[top : top + crop].float()


def load_teacher(name: str, spec: TeacherSpec, data: DataSpec, device: str | torch.device = "cpu") -> Teacher:
    """Build a teacher, load its weights and prove that it fits the data.

    What ``spec`` leaves open comes from the card beside the weights, then from the pretrained weights' own
    configuration, then from the data.

    Args:
        name: of the teacher, for messages (field ``teachers.NAME``).
        spec: architecture and weights; ``weights`` is set.
        data: what the images are.
        device: where the teacher lives.

    Raises:
        UserError: weights, classes, channels or image size do not fit.
    """
    field = f"teachers.{name}"
    if spec.weights is None:
        raise UserError(f"{field}.weights: none given and not trained yet; run squeeze first")
    try:
        if spec.weights == PRETRAINED:
            found = load_pretrained(spec, data.channels, field)
            num_outputs = spec.num_outputs or found.num_outputs
            teacher = _wrap(name, spec, found.network, num_outputs, data, None, found)
        else:
            card = card_beside(spec.weights)
            num_outputs = _num_outputs(spec, card, data, field)
            network = build_network(spec, num_outputs, data.channels)
            state = load_state(spec.weights, sha256=card.sha256 if card else None)
            apply_weights(network, state, spec.key_map, f"{field}: {spec.weights}")
            teacher = _wrap(name, spec, network, num_outputs, data, card, None)
    except UserError as error:
        message = str(error)
        raise (error if message.startswith(field) else UserError(f"{field}: {message}")) from None
    _try_out(teacher, field)
    # Weights of a layout make convolutions lay out their activations likewise.
    return teacher.to(device=device, memory_format=memory_format(teacher.network))  # type: ignore[call-overload]


def fresh_teacher(name: str, spec: TeacherSpec, data: DataSpec, seed: int) -> Teacher:
    """An untrained teacher for ``squeeze``: the data's classes; weights a function of ``seed``.

    Its network may be trained by itself (``teacher.network.train()``, ``requires_grad_``).

    Raises:
        UserError: the architecture does not fit the data.
    """
    field = f"teachers.{name}"
    classes = data.num_classes
    try:
        network = build_network(spec, classes, data.channels, seed=seed)
        teacher = _wrap(name, spec, network, classes, data, None, None)
    except UserError as error:
        message = str(error)
        raise (error if message.startswith(field) else UserError(f"{field}: {message}")) from None
    _try_out(teacher, field)
    return teacher


def _wrap(
    name: str,
    spec: TeacherSpec,
    network: nn.Module,
    num_outputs: int,
    data: DataSpec,
    card: TeacherCard | None,
    pretrained: Pretrained | None,
) -> Teacher:
    field = f"teachers.{name}"
    known = card or pretrained
    class_names = spec.class_names or (card.class_names if card else None)
    class_index = spec.class_index or (card.class_index if card else None)
    outputs = match_classes(data.class_names, num_outputs, class_names, class_index, field)
    mean = spec.mean or (known.mean if known else None)
    std = spec.std or (known.std if known else None)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != data.channels:
            raise UserError(
                f"{field}.{key}: {len(values)} values for images of {data.channels} channels; give one each"
            )
    input_size = spec.input_size or (known.input_size if known else None) or data.image_size
    resize = spec.resize or (card.resize if card and not spec.input_size else None) or input_size
    if resize < input_size:
        raise UserError(f"{field}.resize: {resize} is less than input_size = {input_size}; raise it or leave it out")
    names = class_names or (list(data.class_names) if outputs is None else None)
    return Teacher(
        name, network, data, num_outputs=num_outputs, outputs=outputs, class_names=names,
        mean=mean, std=std, input_size=input_size, resize=resize,
    )  # fmt: skip


def _num_outputs(spec: TeacherSpec, card: TeacherCard | None, data: DataSpec, field: str) -> int:
    if spec.num_outputs:
        return spec.num_outputs
    if card:
        return card.num_outputs
    if spec.class_names:
        return len(spec.class_names)
    if spec.class_index:
        raise UserError(f"{field}.num_outputs: needed beside class_index; give the number of the network's classes")
    return data.num_classes


def match_classes(
    wanted: Sequence[str],
    num_outputs: int,
    class_names: Sequence[str] | None,
    class_index: Mapping[str, int] | None,
    field: str,
) -> list[int] | None:
    """Output of each data class, None where the network's outputs are the data's classes in order.

    Args:
        wanted: the data's class names in label order.
        num_outputs: outputs of the network.
        class_names: of the network, where known.
        class_index: data class → output, where the configuration gives it.
        field: for errors.

    Raises:
        UserError: count, order or names do not fit.
    """
    if class_names is not None and len(class_names) != num_outputs:
        raise UserError(f"{field}.class_names: {len(class_names)} names for {num_outputs} outputs; name every output")
    if class_index is not None:
        lacking = [c for c in wanted if c not in class_index]
        if lacking:
            raise UserError(
                f"{field}.class_index: no entry for the data's {', '.join(lacking[:3])}"
                f"{' …' if len(lacking) > 3 else ''}; name the network's output of every class"
            )
        outputs = [class_index[c] for c in wanted]
        wrong = [c for c, k in zip(wanted, outputs, strict=True) if not 0 <= k < num_outputs]
        if wrong or len(set(outputs)) < len(outputs):
            what = f"{wrong[0]} → {class_index[wrong[0]]}" if wrong else "two classes share an output"
            raise UserError(f"{field}.class_index: {what}; give each class one of the outputs 0 … {num_outputs - 1}")
        return outputs
    if num_outputs != len(wanted):
        raise UserError(
            f"{field}: the network has {num_outputs} classes, the data have {len(wanted)}; say which output is which "
            f"class with {field}.class_index, or set num_outputs to the network's own"
        )
    if class_names is not None and list(class_names) != list(wanted):
        k = next(i for i, (a, b) in enumerate(zip(class_names, wanted, strict=True)) if a != b)
        kind = "order" if sorted(class_names) == sorted(wanted) else "names"
        raise UserError(
            f"{field}: class {kind} differ between the teacher and the data (class {k} is {class_names[k]!r} there and "
            f"{wanted[k]!r} in the data); say which output is which class with {field}.class_index"
        )
    return None


def _try_out(teacher: Teacher, field: str) -> None:
    """One grey image through the network: everything that cannot work shows here, in seconds."""
    data = teacher.data
    what = f"{data.channels} × {teacher.input_size} × {teacher.input_size} images"
    try:
        with torch.inference_mode():
            logits = teacher.forward_full(torch.zeros(1, data.channels, data.image_size, data.image_size))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{field}: the network does not take {what} ({lines[0]}); choose an architecture for this size or set "
            f"{field}.input_size"
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (1, teacher.num_outputs):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{field}: the network returns {got} for one image instead of [1, {teacher.num_outputs}] logits; correct "
            "num_outputs or the architecture"
        )
    if not torch.isfinite(logits).all():
        raise UserError(
            f"{field}: the network's outputs are not finite for {what}: too small an image, or damaged weights; set "
            f"{field}.input_size or give other weights"
        )
