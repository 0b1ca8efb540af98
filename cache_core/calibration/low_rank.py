"""Computes low-rank factors W ≈ A·B of linear layers for increment-calibrated caching (ICC, arXiv 2505.05829).

The method "svd" truncates W itself. The others weigh its channels first, "ca_svd" by the mean magnitude of their activations and "cd_svd"
by that of their increments from one evaluation to the next: diag(l)·W·diag(r) = U·S·Vᵀ, A = diag(l)⁻¹·U_k·S_k, B = V_kᵀ·diag(r)⁻¹.

Weights are found by calling the layers, so the host itself handles quantised, patched and offloaded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.linear_sites import LinearSite
from ..families.shared.fused import LinearPart
from ..overrides import Forward, forward_overrides

METHODS = ("svd", "ca_svd", "cd_svd")
_AMPLITUDE = 256.0  # scale of the identity: far above the bias, so that half precision keeps the digits of the weight; fp8 ends at 448
_PROBES = 4  # random inputs that check a weight
_FLOOR = 1e-3  # smallest channel weight as a share of the largest, as in the authors' code
_OVERSAMPLING, _ITERATIONS = 32, 4  # extra directions and rounds of the subspace iteration
_LARGEST = 1024.0  # largest entry of B in a file: half precision ends at 65504, and B is divided by r, which is small for increments
_SMALL = 1024  # up to this smaller side of a matrix, an exact decomposition takes less than a second


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype, device: torch.device, chunk: int = 1024) -> Tensor:
    """Finds the weight of a linear layer by calling it with rows of the identity.

    The bias is subtracted. A few random inputs check the result and give the factor by which layers with quantised inputs clip or round the
    identity.

    Args:
        module: The layer.
        dtype: Dtype that the layer is called in when sampling.
        device: Device that the layer is called on when sampling.
        chunk: Rows of the identity per call.

    Returns:
        The weight (out_features, in_features) in float32 on `device`.

    Raises:
        ValueError: If the layer does not answer as a linear one does.
    """
    width = int(module.in_features)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    probes = torch.cat((torch.zeros(1, width), 0.5 * torch.randn(_PROBES, width, generator=generator)))
    probes = probes.to(dtype)  # rounded as the layer sees them
    answers = module(probes.to(device)[None].clone())[0].float()
    bias, answers = answers[0], answers[1:] - answers[0]
    weight = torch.empty(int(module.out_features), width, device=device)  # type: ignore[arg-type]
    for start in range(0, width, chunk):
        columns = torch.arange(start, min(start + chunk, width), device=device)
        rows = torch.zeros(1, len(columns), width, dtype=dtype, device=device)
        rows[0, columns - start, columns] = _AMPLITUDE
        weight[:, columns] = (module(rows)[0].float() - bias).T / _AMPLITUDE
    return _verified(weight, probes[1:].to(device).float(), answers)


def _verified(weight: Tensor, probes: Tensor, answers: Tensor) -> Tensor:
    """Checks a weight with random inputs and returns it, scaled in place if they show that it must be.

    Args:
        weight: (out, in), as found.
        probes: (n, in), the random inputs.
        answers: (n, out), the answers of the layer to them, without the bias.
    """
    expected = probes @ weight.T
    power = float(expected.square().sum())
    gain = float((expected * answers).sum()) / power if power else 1.0  # power is 0 in a layer of zeros
    if float((answers - gain * expected).norm()) > 0.25 * float(answers.norm()):
        raise ValueError("a linear layer of this model gives results that are not linear, so it cannot be factorised")
    return weight if abs(gain - 1) < 0.01 else weight.mul_(gain)


class _Mean:
    """Keeps the sum and the count of |values| per channel, in float64 on the CPU.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def add(self, values: Tensor) -> None:
        values = values.reshape(-1, values.shape[-1])
        self.total += torch.linalg.vector_norm(values, ord=1, dim=0, dtype=torch.float32).double().cpu()
        self.count += values.shape[0]


class Magnitudes:
    """Measures the mean magnitude of every input and output channel of each layer, over all tokens and samples seen.

    Increments need the tokens of the evaluation before. They are kept on the CPU: tokens · (in + out) numbers per layer, batch row and
    cond, in all 1.8 GB in bf16 for FLUX with 256 tokens.

    Args:
        increments: Whether to measure the change since the previous evaluation of the same cond (CD-SVD) instead of the activation itself
            (CA-SVD).
        tokens: For increments, largest number of a cond's tokens that are kept and compared, evenly spaced.

    Raises:
        ValueError: If `tokens` is below 1.
    """

    def __init__(self, increments: bool = False, tokens: int = 256) -> None:
        if tokens < 1:
            raise ValueError(f"at least one token must be compared, not {tokens}")
        self.increments = increments
        self._tokens = tokens
        self._means: dict[str, tuple[_Mean, _Mean]] = {}
        self._previous: dict[tuple[str, Hashable], tuple[Tensor, Tensor]] = {}

    def begin_run(self) -> None:
        """Forgets the previous evaluation, because the first one of a run is no increment of the last one of the run before."""
        self._previous.clear()

    def add(self, site: LinearSite, cond: Hashable, x: Tensor, y: Tensor) -> None:
        """Adds one call of a layer for one cond.

        Args:
            site: The layer.
            cond: Identity of the cond.
            x: Input (…, L, in_features).
            y: Output (…, L, out_features).
        """
        if self.increments:
            key = site.name, cond
            stride = -(-x.shape[-2] // self._tokens) | 1  # odd, so that the tokens do not all lie in one column of the picture
            present = x[..., ::stride, :].to("cpu", copy=True), y[..., ::stride, :].to("cpu", copy=True)
            before = self._previous.get(key)
            self._previous[key] = present
            if before is None or before[0].shape != present[0].shape:
                return
            x, y = (now.float() - then.float() for now, then in zip(present, before))
        inputs, outputs = self._means.setdefault(site.name, (_Mean(site.in_features), _Mean(site.out_features)))
        inputs.add(x)
        outputs.add(y)

    def means(self, site: LinearSite) -> tuple[Tensor, Tensor]:
        """Returns the mean magnitudes of the inputs (in_features,) and of the outputs (out_features,) of a layer, in float64.

        Raises:
            ValueError: If none were measured.
        """
        if site.name not in self._means:
            raise ValueError(f"no activations of {site.name} were measured" + (" in two evaluations of one run" if self.increments else ""))
        inputs, outputs = self._means[site.name]
        return inputs.total / inputs.count, outputs.total / outputs.count


def measuring(conds: Sequence[Hashable], sites: Iterable[LinearSite], *magnitudes: Magnitudes) -> AbstractContextManager[None]:
    """Makes a context around one full model call that adds the inputs and outputs (B, L, C) of every layer to all `magnitudes`.

    Args:
        conds: Identity of each cond in the batch, in row order; all have equally many rows.
        sites: The layers.
        magnitudes: Measurements to add to.
    """

    def listener(site: LinearSite) -> Callable[[Forward], Forward]:
        def make(forward: Forward) -> Forward:
            numbers = count()

            def measured(*args: Any, **kwargs: Any) -> Any:
                number = next(numbers)  # tells apart the calls of a layer that gets its tokens in pieces
                if not args or args[0].ndim < 3:
                    return forward(*args, **kwargs)  # not per token, so incremental evaluations do not answer it either
                x = site.ordered(args[0]).flatten(1, -2).clone()  # fp8 layers clamp their input in place
                result = forward(*args, **kwargs)
                y = site.ordered(result).flatten(1, -2)
                for cond, inputs, outputs in zip(conds, x.chunk(len(conds)), y.chunk(len(conds))):
                    for each in magnitudes:
                        each.add(site, (cond, number), inputs, outputs)
                return result

            return measured

        return make

    return forward_overrides([(site.module, listener(site)) for site in sites])


class LowRank(NamedTuple):
    """The low-rank factors of a matrix.

    Args:
        a: (out, rank), columns by falling singular value.
        b: (rank, in).
        energy: Share 0..1 of the square norm of the weighted matrix that they keep.
    """

    a: Tensor
    b: Tensor
    energy: float


def factorise(
    weight: Tensor,
    rank: int,
    method: str = "svd",
    in_magnitude: Tensor | None = None,
    out_magnitude: Tensor | None = None,
    exact: bool = True,
) -> LowRank:
    """Factorises a matrix W ≈ a·b, in the precision of W but at least in float32.

    Args:
        weight: W (out, in).
        rank: Largest rank of the factors, at least 1.
        method: One of `METHODS`.
        in_magnitude: (in,), mean magnitude per input channel: of activations for "ca_svd", of increments for "cd_svd". Not used by "svd".
        out_magnitude: (out,), the same per output channel.
        exact: Whether to decompose large matrices exactly. False finds their leading singular vectors by subspace iteration, which at width
            3072 makes the error 0.04 to 0.26 % larger and takes a fifteenth of the time. It is repeatable and does not touch torch's random
            state.

    Raises:
        ValueError: For an unknown method, a rank below 1 or missing magnitudes.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    weight = weight if weight.dtype is torch.float64 else weight.float()
    left, right = torch.ones_like(weight[:, 0]), torch.ones_like(weight[0])
    if method != "svd":
        if in_magnitude is None or out_magnitude is None:
            raise ValueError(f"{method} needs the channels' magnitudes")
        left, right = channel_weights(out_magnitude).to(weight), channel_weights(in_magnitude).to(weight)
    weighted = left[:, None] * weight * right
    rank = min(rank, *weighted.shape)
    u, s, vt = _exact_svd(weighted) if exact else _leading_svd(weighted, rank)
    norm = float(weighted.square().sum())
    energy = float(s[:rank].square().sum()) / norm if norm else 1.0
    # divided even if left and right are ones: this makes new tensors, and views would keep all of u and vt alive
    return LowRank(u[:, :rank] * s[:rank] / left[:, None], vt[:rank] / right, min(energy, 1.0))


def channel_weights(magnitude: Tensor) -> Tensor:
    """Returns the paper's l or r: the square root of the mean magnitudes (n,), raised to at least a thousandth of the largest."""
    weights = magnitude.double().sqrt()
    largest = float(weights.max())
    return weights.clamp(min=_FLOOR * largest) if largest > 0 else torch.ones_like(weights)


def factorise_sites(
    sites: Sequence[LinearSite],
    rank: int,
    method: str,
    magnitudes: Magnitudes | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    *,
    call_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Factorises every part of every layer. Only one layer is dense at a time.

    Args:
        sites: The layers.
        rank: Largest rank of the factors.
        method: One of `METHODS`.
        magnitudes: Magnitudes for the method. None for "svd".
        dtype: Dtype of the factors.
        device: Device on which layers are called and matrices factorised.
        progress: Called after each layer with the number of layers that are done and of all layers.
        call_dtype: Dtype that layers are called in, the model's compute dtype. None takes `dtype`.
        exact: As in `factorise`.

    Returns:
        The factors in system memory, named "<part key>.A" and "<part key>.B", and by part key the share 0..1 of the part's square norm
        (weighted as the method does) that they keep.

    Raises:
        ValueError: If `magnitudes` are of the other method, and as `factorise` and `dense_weight` do.
    """
    if method == "cd_svd" and magnitudes is not None and not magnitudes.increments:
        raise ValueError("cd_svd needs the magnitudes of increments")
    if method == "ca_svd" and magnitudes is not None and magnitudes.increments:
        raise ValueError("ca_svd needs the magnitudes of activations, not of increments")
    factors: dict[str, Tensor] = {}
    energies: dict[str, float] = {}
    for done, site in enumerate(sites, start=1):
        means = magnitudes.means(site) if magnitudes is not None and method != "svd" else (None, None)
        for part, (a, b, energy) in _factorise_parts(site, rank, method, means, call_dtype or dtype, device, exact):
            energies[site.key(part)] = energy
            excess = max(1.0, float(b.abs().max()) / _LARGEST)  # A = W·diag(r)·V is too small by the factor by which B is too large
            factors[f"{site.key(part)}.A"] = (a * excess).to("cpu", dtype)
            factors[f"{site.key(part)}.B"] = (b / excess).to("cpu", dtype)
        if progress is not None:
            progress(done, len(sites))
    return factors, energies


def _factorise_parts(
    site: LinearSite,
    rank: int,
    method: str,
    means: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> list[tuple[LinearPart, LowRank]]:
    """Factorises the parts of one layer. Its dense weight is freed on return."""
    weight = dense_weight(site.module, dtype, device)
    found = []
    for part in site.parts:
        rows = part.rows or slice(None)
        in_magnitude, out_magnitude = means[0], None if means[1] is None else means[1][rows]
        found.append((part, factorise(weight[rows], rank, method, in_magnitude, out_magnitude, exact)))
    return found


def _exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds at least the `rank` leading singular triplets by subspace iteration (Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    width = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_SMALL, width):
        return _exact_svd(matrix)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vt = _exact_svd(basis.T @ matrix)
    return basis @ u, s, vt
