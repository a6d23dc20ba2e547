"""Backpropagation of one batch, layer by layer: z, activation, δ, dW, db, with the formulas, held to autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bp_torch import functional, nn
from bp_torch.functions.activation import lookup

from .backprop_records import Call, Layer, generator_state, set_generator_state
from .backprop_rules import explain
from .run import PerFit

KNOWN_LOSSES = {
    torch.nn.functional.cross_entropy: torch.nn.CrossEntropyLoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
    torch.nn.functional.mse_loss: torch.nn.MSELoss,
    functional.mse_loss: nn.MSELoss,
}
SHOWN_ROWS, LAYERS_IN_FIGURE = 64, 6


class Recorder:
    """A context in which every call of every module is recorded, forward and backward; the modules are unchanged after.

    Gradients are those of each call alone: each input, and each parameter that the module holds itself, goes through
    an alias whose gradient a hook sees. So a penalty on a weight, or a second use of a layer, is not mixed in.
    """

    def __init__(self, modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
        self.modules = list(modules)
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.hooks: list[Any] = []
        self.recording = True

    def __enter__(self) -> Recorder:
        for name, module in self.modules:
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True)
            after = module.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self.hooks += [before, after]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.recording or not torch.is_grad_enabled():
                return None
            try:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
            except (TypeError, ValueError):
                return None  # the call itself says what is wrong with it
            given = dict(bound.arguments)
            like = next((v for v in given.values() if isinstance(v, Tensor)), torch.empty(0))
            state = generator_state(like)
            copies = {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in given.items()}
            call = Call(name, module, copies, module.training, state, state)
            call.buffers = {key: b.detach().clone() for key, b in module.named_buffers(recurse=False)}
            for key, value in given.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    # An in-place layer must get the tensor itself.
                    alias = value if getattr(module, "inplace", False) else value.view_as(value)
                    alias.register_hook(lambda g, key=key: _add(call.dx, key, g))
                    bound.arguments[key] = alias
            if not module._modules:
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        call.parameters[key] = parameter.detach().clone()
                        if parameter.requires_grad:
                            alias = parameter.view_as(parameter)
                            alias.register_hook(lambda g, key=key: _add(call.gradients, key, g))
                            module._parameters[key] = alias  # type: ignore[assignment]
                            vars(call).setdefault("held", {})[key] = parameter
            if self.stack:
                self.stack[-1].children.append(call)
            self.calls.append(call)
            self.stack.append(call)
            return bound.args, bound.kwargs

        return hook

    def _after(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.stack or self.stack[-1].module is not module:
            return
        call = self.stack.pop()
        module._parameters.update(vars(call).pop("held", {}))
        if isinstance(output, Tensor):
            call.output = output.detach().clone()
            call.rng_after = generator_state(output)
            if output.requires_grad:
                output.register_hook(lambda g: setattr(call, "dy", g.detach().clone()))


def _add(into: dict[str, Tensor], key: str, gradient: Tensor) -> None:
    into[key] = gradient.detach().clone() if key not in into else into[key] + gradient


class View:
    """What `backprop_view` returns: the layers in the order of the forward pass.

    `print(view)` shows the differences between formulas and autograd, `view.markdown()` the table, `view.figures()`
    draws, `view.save(folder)` writes both. `view.holds` is true if every formula agreed with autograd.
    """

    def __init__(self, layers: Sequence[Layer], loss: float | None = None) -> None:
        self.layers = list(layers)
        self.loss = loss

    @property
    def holds(self) -> bool:
        return all(identity.holds for layer in self.layers for identity in layer.identities)

    def __getitem__(self, name: str) -> Layer:
        """The first layer of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} is not among the layers: {', '.join(layer.name for layer in self.layers)}")

    def __str__(self) -> str:
        rows = [("layer", "identity", "max |by formula - autograd|", "relative to the largest term", "holds")]
        for layer in self.layers:
            for i in layer.identities:
                rows.append(
                    (layer.name, i.name, f"{i.difference:.1e}", f"{i.relative:.1e}", "yes" if i.holds else "NO")
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        count = sum(len(layer.identities) for layer in self.layers)
        failed = sum(not i.holds for layer in self.layers for i in layer.identities)
        return "\n".join([*lines, f"{count} identities, {failed} of them fail" if failed else f"all {count} hold"])

    def markdown(self, heading: str = "Backpropagation of one batch") -> str:
        """The layers with formulas and numbers, then the formulas of the activations, then the identities."""
        lines = [f"# {heading}", ""]
        if self.loss is not None:
            lines += [
                f"L = {self.loss:.6g}. Layers stand in the order of the forward pass; read δ from below upwards.",
                "",
            ]
        lines += ["Numbers are root mean squares, with the shape.", ""]
        lines += [
            "| layer | forward | z | a (output) | backward | δ = ∂L/∂z | parameters' gradients |",
            "|---" * 7 + "|",
        ]
        for layer in self.layers:
            gradients = "<br>".join(f"{name}: {_rms(g)}" for name, g in layer.gradients.items())
            lines.append(
                f"| {layer.name} ({layer.kind}) | {'<br>'.join(layer.forward)} | {_rms(layer.z)} | {_rms(layer.a)} "
                f"| {'<br>'.join(layer.backward)} | {_rms(layer.delta)} | {gradients or '–'} |"
            )
        used = sorted({activation for layer in self.layers for activation in layer.activations})
        if used:
            lines += ["", "| activation | f(x) | f′(x), with y = f(x) |", "|---|---|---|"]
            for name, values in used:
                row = lookup(name, values)
                given = ", ".join(f"{key} = {value:g}" for key, value in zip(row.parameters, values, strict=True))
                formula, derivative = (text.replace("|", "\\|") for text in (row.formula, row.derivative))
                lines.append(f"| {name}{f' ({given})' if given else ''} | {formula} | {derivative} |")
        lines += ["", "Each gradient by the formula (in float64) and as autograd had it:", ""]
        lines += ["| layer | identity | max \\|difference\\| | relative | holds |", "|---" * 5 + "|"]
        for layer in self.layers:
            for i in layer.identities:
                verdict = "yes" if i.holds else "**no**"
                lines.append(f"| {layer.name} | {i.name} | {i.difference:.1e} | {i.relative:.1e} | {verdict} |")
        return "\n".join([*lines, ""])

    def figures(self) -> list[Figure]:
        """z, a, δ, dW and db of each layer as images, six layers a figure, in the order of the forward pass."""
        pages = [self.layers[i : i + LAYERS_IN_FIGURE] for i in range(0, len(self.layers), LAYERS_IN_FIGURE)]
        return [_page(page) for page in pages]

    def save(self, folder: str | Path, name: str = "backprop") -> Path:
        """Write `<name>.md` and `<name>_1.png`, ...; return the table's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.markdown()
        for number, figure in enumerate(self.figures(), 1):
            figure.savefig(folder / f"{name}_{number}.png", dpi=110)
            text += f"\n![z, a, δ, dW and db by layer]({name}_{number}.png)\n"
        path = folder / f"{name}.md"
        path.write_text(text, "utf-8")
        return path


def backprop_view(
    model: torch.nn.Module, x: Tensor, y: Any, loss: Callable[[Tensor, Any], Tensor] = functional.cross_entropy
) -> View:
    """Run `loss(model(x), y)` forward and backward once, and show what happened in every layer.

    The model is left as it was: parameters, their `.grad`, buffers, mode and the generators' state. Layers that have
    no formula here (convolutions, attention, a user's own) are shown with autograd's numbers alone.

    Args:
        model: any module from a batch x to an output; in training or evaluation mode, as it is.
        x: the batch, (N, ...). If it is floating, ∂L/∂x is checked too.
        y: the targets, handed to `loss`.
        loss: a module or a function to a scalar. Of cross-entropy and mean squared error (torch's or bp_torch's) the
            gradient is checked too.

    Raises:
        ValueError: a loss that is not a single number, or that does not depend on the model.
    """
    if isinstance(loss, type):
        raise TypeError(f"loss must be called with (output, y); {loss.__name__} is a class: write {loss.__name__}()")
    known = KNOWN_LOSSES.get(loss)
    criterion: Any = known() if known is not None else loss
    modules = list(model.named_modules())
    modules[0] = ("model", model)
    if isinstance(criterion, torch.nn.Module):
        modules.append(("loss", criterion))
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    device = generator_state(x) if x.device.type != "cpu" else None
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    try:
        with torch.enable_grad(), Recorder(modules) as recorder:
            value = criterion(model(x), y)
            if value.numel() != 1:
                raise ValueError(f"loss must give a single number, got the shape {tuple(value.shape)}")
            wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
            if not value.requires_grad or not wanted:
                raise ValueError("the loss does not depend on the model's parameters or on x by differentiable steps")
            torch.autograd.grad(value, wanted, allow_unused=True)
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)
        torch.set_rng_state(state)
        if device is not None:
            set_generator_state(x, device)
    return View(explained(recorder.calls), float(value.detach()))


def explained(calls: Sequence[Call]) -> list[Layer]:
    """Rows of all calls that have one, inner ones first; a second call of a module is numbered."""
    seen: dict[int, int] = {}
    rows: list[Layer] = []

    def visit(call: Call) -> None:
        for child in call.children:
            visit(child)
        seen[id(call.module)] = seen.get(id(call.module), 0) + 1
        if call.dy is not None and (layer := explain(call)) is not None:
            if (times := seen[id(call.module)]) > 1:
                layer.name += f" (call {times})"
            rows.append(layer)

    inside = {id(child) for call in calls for child in call.children}
    for call in calls:
        if id(call) not in inside:
            visit(call)
    return rows


class BackpropView(PerFit):
    """Show the backpropagation of chosen training steps of any LightningModule.

    For each such step, `<folder>/step_<n>.md` and its figures: z, activation, δ, dW and db of every layer with the
    formulas beside them, and the differences between formulas and autograd, which are printed too. The step trains as
    it would have. Gradients are of the loss that Lightning calls backward on: divided by `accumulate_grad_batches`, and
    in 16-bit mixed precision multiplied by the scaler's scale.

    Args:
        steps: batches to show, counted from 0 over all epochs.
        folder: where to write; None is `backprop` in the trainer's `default_root_dir`.
    """

    def __init__(self, steps: Sequence[int] = (0,), folder: str | Path | None = None) -> None:
        if any(step < 0 for step in steps):
            raise ValueError(f"steps must not be negative, got {list(steps)}")
        self.steps, self.folder = set(steps), folder
        self.forget()

    def forget(self) -> None:
        self.batch = 0
        self.recorder: Recorder | None = None
        self.views: dict[int, View] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batch in self.steps:
            modules = [(name, module) for name, module in pl_module.named_modules() if name]
            self.recorder = Recorder(modules).__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.recorder is not None:
            self.recorder.recording = False  # what checkpointing calls again in backward is no new layer
            self.loss = float(loss.detach())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recorder is None:
            return
        self._stop()
        assert self.recorder is not None
        view = View(explained(self.recorder.calls), self.loss)
        self.recorder = None
        self.views[self.batch] = view
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "backprop" if self.folder is None else Path(self.folder)
            path = view.save(folder, f"step_{self.batch}")
            rank_zero_info(f"backpropagation of step {self.batch}, {path}\n{view}")
        if not view.holds:
            rank_zero_warn(
                f"BackpropView: step {self.batch}: formulas and autograd disagree; see the table", stacklevel=2
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop()
        self.recorder = None
        self.batch += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()
        self.recorder = None

    def _stop(self) -> None:
        if self.recorder is not None:
            self.recorder.__exit__()

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batch = state_dict["batch"]


def _rms(tensor: Tensor | None) -> str:
    if tensor is None:
        return "–"
    shape = " × ".join(map(str, tensor.shape)) or "1"
    return f"{float(tensor.double().square().mean().sqrt()):.3g} ({shape})" if tensor.numel() else f"empty ({shape})"


def _image(axes: Axes, tensor: Tensor | None, xlabel: str, ylabel: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if tensor is None or not tensor.numel():
        axes.set_axis_off()
        return
    array = tensor.detach().double().cpu().numpy()
    array = array.reshape(1, -1) if array.ndim < 2 else array.reshape(len(array), -1)
    if ylabel == "row":
        array = array[:SHOWN_ROWS]
    finite = np.abs(array[np.isfinite(array)])
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    axes.imshow(array, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_xlabel(f"{xlabel} ({array.shape[1]}), ±{top:.2g}", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)


def _page(layers: Sequence[Layer]) -> Figure:
    titles = ("z", "a", "δ = ∂L/∂z", "dW (or dγ)", "db (or dβ)")
    figure = Figure(figsize=(13, 1.9 * len(layers) + 0.7), layout="constrained")
    axes = figure.subplots(len(layers), 5, squeeze=False, width_ratios=(1, 1, 1, 1, 0.8))
    for row, layer in zip(axes, layers, strict=True):
        for place, tensor in enumerate((layer.z, layer.a, layer.delta)):
            _image(row[place], tensor, "unit", "row")
        gradients = list(layer.gradients.values())
        weight = next((g for g in gradients if g.ndim > 1), gradients[0] if gradients else None)
        bias = gradients[-1] if len(gradients) > 1 else None
        square = weight is not None and weight.ndim > 1
        _image(row[3], weight, "input" if square else "unit", "unit" if square else "")
        _image(row[4], bias, "unit", "")
        row[0].set_title(f"{layer.name} ({layer.kind})", fontsize=9, loc="left", weight="bold")
    for column, title in enumerate(titles):
        before = axes[0][column].get_title("left")
        axes[0][column].set_title(title if not before else f"{before}: {title}", fontsize=9, loc="left", weight="bold")
    figure.suptitle("one batch: rows of the image are rows of the batch; red > 0 > blue, scale below each", fontsize=10)
    return figure
