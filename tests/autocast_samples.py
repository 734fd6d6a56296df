"""A small call for each operation on an autocast list, by overload, on any device and in any dtype.

`CALLS[op](f, i)` makes the call; `f(*shape)` makes a floating-point tensor with values in (0, 1),
`i(values)` an integer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ops = torch.ops.aten
Call = Callable[[Callable[..., Tensor], Callable[[list[Any]], Tensor]], Any]

CONVOLUTIONS: dict[str, Call] = {
    "_convolution": lambda f, i: ops._convolution(
        f(1, 2, 4), f(3, 2, 3), f(3), [1], [0], [1], False, [0], 1, False, False, True, True
    ),
    "_convolution.deprecated": lambda f, i: ops._convolution.deprecated(
        f(1, 2, 4), f(3, 2, 3), f(3), [1], [0], [1], False, [0], 1, False, False, True
    ),
    "convolution": lambda f, i: ops.convolution(
        f(1, 2, 4), f(3, 2, 3), f(3), [1], [0], [1], False, [0], 1
    ),
    "conv1d": lambda f, i: ops.conv1d(f(1, 2, 4), f(3, 2, 3), f(3)),
    "conv2d": lambda f, i: ops.conv2d(f(1, 2, 4, 4), f(3, 2, 3, 3), f(3)),
    "conv3d": lambda f, i: ops.conv3d(f(1, 2, 4, 4, 4), f(3, 2, 3, 3, 3), f(3)),
    "conv1d.padding": lambda f, i: ops.conv1d.padding(f(1, 2, 4), f(3, 2, 3), f(3), [1], "same"),
    "conv2d.padding": lambda f, i: ops.conv2d.padding(
        f(1, 2, 4, 4), f(3, 2, 3, 3), f(3), [1], "same"
    ),
    "conv3d.padding": lambda f, i: ops.conv3d.padding(
        f(1, 2, 4, 4, 4), f(3, 2, 3, 3, 3), f(3), [1], "same"
    ),
    "conv_tbc": lambda f, i: ops.conv_tbc(f(4, 1, 2), f(3, 2, 3), f(3)),
    "conv_transpose1d": lambda f, i: ops.conv_transpose1d(f(1, 2, 4), f(2, 3, 3), f(3)),
    "conv_transpose2d.input": lambda f, i: ops.conv_transpose2d.input(
        f(1, 2, 4, 4), f(2, 3, 3, 3), f(3)
    ),
    "conv_transpose3d.input": lambda f, i: ops.conv_transpose3d.input(
        f(1, 2, 4, 4, 4), f(2, 3, 3, 3, 3), f(3)
    ),
}

PRODUCTS: dict[str, Call] = {
    "addmm": lambda f, i: ops.addmm(f(3, 3), f(3, 2), f(2, 3)),
    "_addmm_activation": lambda f, i: ops._addmm_activation(f(3), f(3, 2), f(2, 3)),
    "addmv": lambda f, i: ops.addmv(f(3), f(3, 2), f(2)),
    "addr": lambda f, i: ops.addr(f(3, 2), f(3), f(2)),
    "matmul": lambda f, i: ops.matmul(f(3, 2), f(2, 3)),
    "einsum": lambda f, i: ops.einsum("ij,jk->ik", [f(3, 2), f(2, 3)]),
    "mm": lambda f, i: ops.mm(f(3, 2), f(2, 3)),
    "mv": lambda f, i: ops.mv(f(3, 2), f(2)),
    "linalg_vecdot": lambda f, i: ops.linalg_vecdot(f(3, 2), f(3, 2)),
    "linear": lambda f, i: ops.linear(f(3, 2), f(4, 2), f(4)),
    "addbmm": lambda f, i: ops.addbmm(f(3, 3), f(2, 3, 2), f(2, 2, 3)),
    "baddbmm": lambda f, i: ops.baddbmm(f(2, 3, 3), f(2, 3, 2), f(2, 2, 3)),
    "bmm": lambda f, i: ops.bmm(f(2, 3, 2), f(2, 2, 3)),
    "chain_matmul": lambda f, i: ops.chain_matmul([f(3, 2), f(2, 3)]),
    "linalg_multi_dot": lambda f, i: ops.linalg_multi_dot([f(3, 2), f(2, 3)]),
    "prelu": lambda f, i: ops.prelu(f(2, 3), f(1)),
    "lstm_cell": lambda f, i: ops.lstm_cell(
        f(2, 3), [f(2, 3), f(2, 3)], f(12, 3), f(12, 3), f(12), f(12)
    ),
    "gru_cell": lambda f, i: ops.gru_cell(f(2, 3), f(2, 3), f(9, 3), f(9, 3), f(9), f(9)),
    "rnn_tanh_cell": lambda f, i: ops.rnn_tanh_cell(f(2, 3), f(2, 3), f(3, 3), f(3, 3), f(3), f(3)),
    "rnn_relu_cell": lambda f, i: ops.rnn_relu_cell(f(2, 3), f(2, 3), f(3, 3), f(3, 3), f(3), f(3)),
    "scaled_dot_product_attention": lambda f, i: ops.scaled_dot_product_attention(
        f(1, 2, 4, 8), f(1, 2, 4, 8), f(1, 2, 4, 8)
    ),
}


def _of(name: str, make: Callable[[Callable[..., Tensor]], Tensor]) -> Call:
    op = getattr(ops, name)
    return lambda f, i: op(make(f))


_ELEMENTARY = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    softplus"""

POINTWISE: dict[str, Call] = {
    **{name: _of(name, lambda f: f(2, 3)) for name in _ELEMENTARY.split()},
    "pow.Tensor_Scalar": lambda f, i: ops.pow.Tensor_Scalar(f(3), 2),
    "pow.Tensor_Tensor": lambda f, i: ops.pow.Tensor_Tensor(f(3), f(3)),
    "pow.Scalar": lambda f, i: ops.pow.Scalar(2, f(3)),
    "addcdiv": lambda f, i: ops.addcdiv(f(3), f(3), f(3)),
    "addcmul": lambda f, i: ops.addcmul(f(3), f(3), f(3)),
    "atan2": lambda f, i: ops.atan2(f(3), f(3)),
    "cross": lambda f, i: ops.cross(f(2, 3), f(2, 3)),
    "dot": lambda f, i: ops.dot(f(3), f(3)),
    "vdot": lambda f, i: ops.vdot(f(3), f(3)),
    "bilinear": lambda f, i: ops.bilinear(f(2, 3), f(2, 4), f(5, 3, 4), f(5)),
    "tensordot": lambda f, i: ops.tensordot(f(2, 3), f(3, 2), [1], [0]),
    "grid_sampler": lambda f, i: ops.grid_sampler(f(1, 1, 4, 4), f(1, 3, 3, 2), 0, 0, False),
    "index_put": lambda f, i: ops.index_put(f(3), [i([0, 2])], f(2)),
    "scatter_add": lambda f, i: ops.scatter_add(f(3), 0, i([0, 2]), f(2)),
    "trace": lambda f, i: ops.trace(f(3, 3)),
    "stack": lambda f, i: ops.stack([f(3), f(3)]),
    "cat": lambda f, i: ops.cat([f(3), f(3)]),
    "index_copy": lambda f, i: ops.index_copy(f(3), 0, i([0, 2]), f(2)),
}

NORMS: dict[str, Call] = {
    "layer_norm": lambda f, i: ops.layer_norm(f(2, 4), [4], f(4), f(4)),
    "native_layer_norm": lambda f, i: ops.native_layer_norm(f(2, 4), [4], f(4), f(4), 1e-5),
    "rms_norm": lambda f, i: ops.rms_norm(f(2, 4), [4], f(4)),
    "group_norm": lambda f, i: ops.group_norm(f(2, 4), 2, f(4), f(4)),
    "frobenius_norm.dim": lambda f, i: ops.frobenius_norm.dim(f(2, 3), [1]),
    "nuclear_norm": lambda f, i: ops.nuclear_norm(f(2, 3)),
    "nuclear_norm.dim": lambda f, i: ops.nuclear_norm.dim(f(2, 3), [0, 1]),
    "norm.Scalar": lambda f, i: ops.norm.Scalar(f(2, 3), 2),
    "norm.ScalarOpt_dim": lambda f, i: ops.norm.ScalarOpt_dim(f(2, 3), 2, [1]),
    "linalg_vector_norm": lambda f, i: ops.linalg_vector_norm(f(2, 3)),
    "linalg_matrix_norm": lambda f, i: ops.linalg_matrix_norm(f(2, 3), 1),
    "linalg_matrix_norm.str_ord": lambda f, i: ops.linalg_matrix_norm.str_ord(f(2, 3), "fro"),
    "dist": lambda f, i: ops.dist(f(3), f(3)),
    "pdist": lambda f, i: ops.pdist(f(3, 2)),
    "cdist": lambda f, i: ops.cdist(f(3, 2), f(4, 2)),
    "renorm": lambda f, i: ops.renorm(f(2, 3), 2, 0, 0.5),
    "cosine_similarity": lambda f, i: ops.cosine_similarity(f(2, 3), f(2, 3)),
}

REDUCTIONS: dict[str, Call] = {
    "logsumexp": lambda f, i: ops.logsumexp(f(2, 3), [1]),
    "prod": lambda f, i: ops.prod(f(3)),
    "prod.dim_int": lambda f, i: ops.prod.dim_int(f(2, 3), 1),
    "softmax.int": lambda f, i: ops.softmax.int(f(2, 3), 1),
    "log_softmax.int": lambda f, i: ops.log_softmax.int(f(2, 3), 1),
    "cumprod": lambda f, i: ops.cumprod(f(3), 0),
    "cumsum": lambda f, i: ops.cumsum(f(3), 0),
    "sum": lambda f, i: ops.sum(f(3)),
    "sum.dim_IntList": lambda f, i: ops.sum.dim_IntList(f(2, 3), [1]),
}

LOSSES: dict[str, Call] = {
    "poisson_nll_loss": lambda f, i: ops.poisson_nll_loss(f(3), f(3), True, False, 1e-8, 1),
    "cosine_embedding_loss": lambda f, i: ops.cosine_embedding_loss(f(2, 3), f(2, 3), i([1, -1])),
    "nll_loss": lambda f, i: ops.nll_loss(f(2, 3), i([0, 1])),
    "nll_loss2d": lambda f, i: ops.nll_loss2d(f(1, 3, 1, 1), i([[[0]]])),
    "cross_entropy_loss": lambda f, i: ops.cross_entropy_loss(f(2, 3), i([0, 1])),
    "hinge_embedding_loss": lambda f, i: ops.hinge_embedding_loss(f(2), i([1, -1])),
    "kl_div": lambda f, i: ops.kl_div(f(3), f(3)),
    "l1_loss": lambda f, i: ops.l1_loss(f(3), f(3)),
    "smooth_l1_loss": lambda f, i: ops.smooth_l1_loss(f(3), f(3)),
    "huber_loss": lambda f, i: ops.huber_loss(f(3), f(3)),
    "mse_loss": lambda f, i: ops.mse_loss(f(3), f(3)),
    "margin_ranking_loss": lambda f, i: ops.margin_ranking_loss(f(2), f(2), i([1, -1])),
    "multilabel_margin_loss": lambda f, i: ops.multilabel_margin_loss(f(1, 3), i([[0, -1, -1]])),
    "soft_margin_loss": lambda f, i: ops.soft_margin_loss(f(3), f(3).detach()),
    "triplet_margin_loss": lambda f, i: ops.triplet_margin_loss(f(2, 3), f(2, 3), f(2, 3)),
    "multi_margin_loss": lambda f, i: ops.multi_margin_loss(f(2, 3), i([0, 1])),
    "binary_cross_entropy_with_logits": lambda f, i: ops.binary_cross_entropy_with_logits(
        f(3), f(3)
    ),
    "binary_cross_entropy": lambda f, i: ops.binary_cross_entropy(f(3), f(3)),
}

_X3 = ([1, 2, 4], [1, 2, 4, 4], [1, 2, 4, 4, 4])
RESIZING: dict[str, Call] = {
    "upsample_nearest1d": lambda f, i: ops.upsample_nearest1d(f(*_X3[0]), [8]),
    "_upsample_nearest_exact1d": lambda f, i: ops._upsample_nearest_exact1d(f(*_X3[0]), [8]),
    "upsample_nearest2d": lambda f, i: ops.upsample_nearest2d(f(*_X3[1]), [8, 8]),
    "_upsample_nearest_exact2d": lambda f, i: ops._upsample_nearest_exact2d(f(*_X3[1]), [8, 8]),
    "upsample_nearest3d": lambda f, i: ops.upsample_nearest3d(f(*_X3[2]), [8, 8, 8]),
    "_upsample_nearest_exact3d": lambda f, i: ops._upsample_nearest_exact3d(f(*_X3[2]), [8, 8, 8]),
    "upsample_linear1d": lambda f, i: ops.upsample_linear1d(f(*_X3[0]), [8], False),
    "upsample_bilinear2d": lambda f, i: ops.upsample_bilinear2d(f(*_X3[1]), [8, 8], False),
    "_upsample_bilinear2d_aa": lambda f, i: ops._upsample_bilinear2d_aa(f(*_X3[1]), [8, 8], False),
    "upsample_trilinear3d": lambda f, i: ops.upsample_trilinear3d(f(*_X3[2]), [8, 8, 8], False),
    "upsample_bicubic2d": lambda f, i: ops.upsample_bicubic2d(f(*_X3[1]), [8, 8], False),
    "_upsample_bicubic2d_aa": lambda f, i: ops._upsample_bicubic2d_aa(f(*_X3[1]), [8, 8], False),
    "avg_pool3d": lambda f, i: ops.avg_pool3d(f(*_X3[2]), [2]),
    "max_pool3d": lambda f, i: ops.max_pool3d(f(*_X3[2]), [2]),
    "adaptive_avg_pool3d": lambda f, i: ops.adaptive_avg_pool3d(f(*_X3[2]), [2, 2, 2]),
    "adaptive_max_pool3d": lambda f, i: ops.adaptive_max_pool3d(f(*_X3[2]), [2, 2, 2])[0],
    "reflection_pad1d": lambda f, i: ops.reflection_pad1d(f(*_X3[0]), [1, 1]),
    "reflection_pad2d": lambda f, i: ops.reflection_pad2d(f(*_X3[1]), [1, 1, 1, 1]),
    "replication_pad1d": lambda f, i: ops.replication_pad1d(f(*_X3[0]), [1, 1]),
    "replication_pad2d": lambda f, i: ops.replication_pad2d(f(*_X3[1]), [1, 1, 1, 1]),
    "replication_pad3d": lambda f, i: ops.replication_pad3d(f(*_X3[2]), [1, 1, 1, 1, 1, 1]),
}

# On no list of either device: they run in the dtype of their inputs.
UNLISTED: dict[str, Call] = {
    "gelu": lambda f, i: ops.gelu(f(3)),
    "silu": lambda f, i: ops.silu(f(3)),
    "mean": lambda f, i: ops.mean(f(3)),
    "var": lambda f, i: ops.var(f(3)),
    "add.Tensor": lambda f, i: ops.add.Tensor(f(3), f(3)),
    "batch_norm": lambda f, i: ops.batch_norm(
        f(2, 3), f(3), f(3), None, None, True, 0.1, 1e-5, False
    ),
    "embedding": lambda f, i: ops.embedding(f(3, 2), i([0, 2])),
    "max_pool2d": lambda f, i: ops.max_pool2d(f(*_X3[1]), [2]),
}

CALLS: dict[str, Call] = (
    CONVOLUTIONS | PRODUCTS | POINTWISE | NORMS | REDUCTIONS | LOSSES | RESIZING
)


def _spd(f: Callable[..., Tensor]) -> Tensor:
    """Return a matrix whose lower triangle is that of a positive definite one."""
    x = f(3, 3)
    return x + 3 * torch.eye(3, dtype=x.dtype, device=x.device)


def _signal(f: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    return f(64), f(16).detach()


_FOURIER = """fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn fft_rfft fft_irfft fft_rfft2
    fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft"""
_LINEAR_ALGEBRA = """linalg_cond linalg_cholesky linalg_cholesky_ex linalg_svd linalg_svdvals
    linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh linalg_inv linalg_inv_ex linalg_qr
    cholesky inverse pinverse geqrf qr svd _lu_with_info cholesky_inverse"""

# On the CPU's list only. CUDA has no 16-bit kernels for most, so the native rule is what counts.
CPU_ONLY: dict[str, Call] = {
    **{name: _of(name, lambda f: f(4, 4)) for name in _FOURIER.split()},
    **{name: _of(name, _spd) for name in _LINEAR_ALGEBRA.split()},
    "linalg_cond.p_str": lambda f, i: ops.linalg_cond.p_str(_spd(f), "fro"),
    "linalg_solve": lambda f, i: ops.linalg_solve(_spd(f), f(3)),
    "linalg_tensorinv": lambda f, i: ops.linalg_tensorinv(_spd(f), 1),
    "linalg_tensorsolve": lambda f, i: ops.linalg_tensorsolve(_spd(f), f(3)),
    "linalg_lstsq": lambda f, i: ops.linalg_lstsq(_spd(f), f(3, 2)),
    "linalg_householder_product": lambda f, i: ops.linalg_householder_product(f(3, 2), f(2)),
    "cholesky_solve": lambda f, i: ops.cholesky_solve(f(3, 2), _spd(f)),
    "orgqr": lambda f, i: ops.orgqr(f(3, 2), f(2)),
    "ormqr": lambda f, i: ops.ormqr(f(3, 2), f(2), f(3, 2)),
    "triangular_solve": lambda f, i: ops.triangular_solve(f(3, 2), _spd(f)),
    "polar": lambda f, i: ops.polar(f(3), f(3)),
    "view_as_complex": lambda f, i: ops.view_as_complex(f(3, 2)),
    "quantile": lambda f, i: ops.quantile(f(3), f(1).float()),
    "quantile.scalar": lambda f, i: ops.quantile.scalar(f(3), 0.5),
    "nanquantile": lambda f, i: ops.nanquantile(f(3), f(1).float()),
    "nanquantile.scalar": lambda f, i: ops.nanquantile.scalar(f(3), 0.5),
    "stft": lambda f, i: ops.stft(_signal(f)[0], 16, return_complex=True, window=_signal(f)[1]),
    "stft.center": lambda f, i: ops.stft.center(
        _signal(f)[0], 16, return_complex=True, window=_signal(f)[1]
    ),
    "ctc_loss.Tensor": lambda f, i: ops.ctc_loss.Tensor(f(4, 1, 3), i([[1, 2]]), i([4]), i([2])),
    "ctc_loss.IntList": lambda f, i: ops.ctc_loss.IntList(f(4, 1, 3), i([[1, 2]]), [4], [2]),
    "multilabel_margin_loss_forward": lambda f, i: ops.multilabel_margin_loss_forward(
        f(1, 3), i([[0, -1, -1]]), 1
    ),
    "fake_quantize_per_tensor_affine": lambda f, i: ops.fake_quantize_per_tensor_affine(
        f(3), 0.1, 0, 0, 255
    ),
    "grid_sampler_2d": lambda f, i: ops.grid_sampler_2d(f(1, 1, 4, 4), f(1, 3, 3, 2), 0, 0, False),
    "_grid_sampler_2d_cpu_fallback": lambda f, i: ops._grid_sampler_2d_cpu_fallback(
        f(1, 1, 4, 4), f(1, 3, 3, 2), 0, 0, False
    ),
    "grid_sampler_3d": lambda f, i: ops.grid_sampler_3d(f(*_X3[2]), f(1, 3, 3, 3, 3), 0, 0, False),
    "fractional_max_pool2d": lambda f, i: ops.fractional_max_pool2d(
        f(*_X3[1]), [2, 2], [2, 2], f(1, 2, 2).detach()
    ),
    "fractional_max_pool3d": lambda f, i: ops.fractional_max_pool3d(
        f(*_X3[2]), [2, 2, 2], [2, 2, 2], f(1, 2, 3).detach()
    ),
    "max_unpool2d": lambda f, i: ops.max_unpool2d(f(1, 1, 1, 2), i([[[[0, 3]]]]), [2, 4]),
    "max_unpool3d": lambda f, i: ops.max_unpool3d(
        f(1, 1, 1, 1, 2), i([[[[[0, 3]]]]]), [1, 2, 4], [1, 2, 2], [0, 0, 0]
    ),
}

# Their kernels exist on CUDA only, or in builds with cuDNN; a CPU has nothing to rehearse.
CUDA_ONLY = {
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "_scaled_dot_product_flash_attention",
}


def dtypes(result: Any) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the floating-point and complex tensors in the result of a call."""
    results = result if isinstance(result, (list, tuple)) else (result,)
    return tuple(
        r.dtype
        for r in results
        if isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex())
    )
